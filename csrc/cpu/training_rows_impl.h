// The passes of training_rows.h, written once over vec.h.
#pragma once

#include <cmath>

#include "training_impl.h"
#include "training_rows.h"

namespace dq {
namespace {

template <typename T>
void norm_of(const NormForward& n, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float* x = n.x + row * n.width;
        const T* delta = static_cast<const T*>(n.delta) + row * n.width;
        float* sum = n.delta ? n.sum + row * n.width : nullptr;
        T* out = static_cast<T*>(n.out) + row * n.width;
        Sum squares;
        for_each_vector(n.width, [&](int64_t i, int lanes) {
            vf v = load_some(x + i, lanes);
            if (sum) {
                v += load_some(delta + i, lanes);
                store_some(sum + i, v, lanes);
            }
            squares.add(v * v, lanes);
        });
        const float rate = 1.0f / std::sqrt(static_cast<float>(squares.result() / n.width) + n.eps);
        n.rate[row] = rate;
        const float* from = sum ? sum : x;
        for_each_vector(n.width, [&](int64_t i, int lanes) {
            store_some(out + i, load_some(n.weight + i, lanes) * (load_some(from + i, lanes) * rate), lanes);
        });
    }
}

// With g = weight * grad: rate * g - sum * rate^3 * mean(g * sum) + grad_sum.
template <typename T>
void norm_backward_of(const NormBackward& n, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* grad = static_cast<const T*>(n.grad) + row * n.width;
        const float* sum = n.sum + row * n.width;
        Sum dot;
        for_each_vector(n.width, [&](int64_t i, int lanes) {
            dot.add(load_some(n.weight + i, lanes) * load_some(grad + i, lanes) * load_some(sum + i, lanes), lanes);
        });
        const float rate = n.rate[row];
        const float along = static_cast<float>(dot.result() / n.width) * rate * rate * rate;
        float* grad_x = n.grad_x + row * n.width;
        T* grad_delta = n.grad_delta ? static_cast<T*>(n.grad_delta) + row * n.width : nullptr;
        for_each_vector(n.width, [&](int64_t i, int lanes) {
            const vf g = load_some(n.weight + i, lanes) * load_some(grad + i, lanes);
            vf v = g * rate - load_some(sum + i, lanes) * along;
            if (n.grad_sum) v += load_some(n.grad_sum + row * n.width + i, lanes);
            store_some(grad_x + i, v, lanes);
            if (grad_delta) store_some(grad_delta + i, v, lanes);
        });
    }
}

// 1 / (1 + e^-v); a NaN stays one.
DQ_INLINE vf sigmoid(vf v) { return 1.0f / (1.0f + exp_or_nan(-v)); }

template <typename T>
void gated_of(const GatedForward& g, int64_t begin, int64_t end) {
    const T *gate = static_cast<const T*>(g.gate) + begin, *up = static_cast<const T*>(g.up) + begin;
    T* out = static_cast<T*>(g.out) + begin;
    for_each_vector(end - begin, [&](int64_t i, int lanes) {
        const vf v = load_some(gate + i, lanes);
        store_some(out + i, v * sigmoid(v) * load_some(up + i, lanes), lanes);
    });
}

template <typename T>
void gated_backward_of(const GatedBackward& g, int64_t begin, int64_t end) {
    const T *gate = static_cast<const T*>(g.gate) + begin, *up = static_cast<const T*>(g.up) + begin;
    const T* grad = static_cast<const T*>(g.grad) + begin;
    T *grad_gate = static_cast<T*>(g.grad_gate) + begin, *grad_up = static_cast<T*>(g.grad_up) + begin;
    for_each_vector(end - begin, [&](int64_t i, int lanes) {
        const vf v = load_some(gate + i, lanes), s = sigmoid(v), d = load_some(grad + i, lanes);
        store_some(grad_up + i, d * (v * s), lanes);
        store_some(grad_gate + i, d * load_some(up + i, lanes) * (s * (1.0f + v * (1.0f - s))), lanes);
    });
}

void norm_row(const NormForward& n, int64_t begin, int64_t end) {
    n.bf16 ? norm_of<uint16_t>(n, begin, end) : norm_of<float>(n, begin, end);
}
void norm_row_backward(const NormBackward& n, int64_t begin, int64_t end) {
    n.bf16 ? norm_backward_of<uint16_t>(n, begin, end) : norm_backward_of<float>(n, begin, end);
}
void gated(const GatedForward& g, int64_t begin, int64_t end) {
    g.bf16 ? gated_of<uint16_t>(g, begin, end) : gated_of<float>(g, begin, end);
}
void gated_backward_row(const GatedBackward& g, int64_t begin, int64_t end) {
    g.bf16 ? gated_backward_of<uint16_t>(g, begin, end) : gated_backward_of<float>(g, begin, end);
}

constexpr RowKernels kRowPasses = {norm_row, norm_row_backward, gated, gated_backward_row};

}  // namespace
}  // namespace dq

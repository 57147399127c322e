// The passes of latent.h over a range of rows, written once over vec.h.
#pragma once

#include <cmath>

#include "latent.h"
#include "training_impl.h"

namespace dq {
namespace {

constexpr int kMantissaDropped = 20;  // of a float32's bits, those that v's byte has no room for

template <typename T>
struct Narrow {
    typedef T vector __attribute__((vector_size(W * sizeof(T))));
};

// Integers of 8 or 16 bits, widened; zeros beyond `lanes`.
template <typename T>
DQ_INLINE vi load_ints(const T* p, int lanes) {
    typename Narrow<T>::vector v = {};
    if (lanes == W) {
        std::memcpy(&v, p, sizeof v);
    } else {
        std::memcpy(&v, p, static_cast<size_t>(lanes) * sizeof(T));
    }
    return __builtin_convertvector(v, vi);
}

template <typename T>
DQ_INLINE void store_ints(T* p, vi wide, int lanes) {
    const auto v = __builtin_convertvector(wide, typename Narrow<T>::vector);
    if (lanes == W) {
        std::memcpy(p, &v, sizeof v);
    } else {
        std::memcpy(p, &v, static_cast<size_t>(lanes) * sizeof(T));
    }
}

DQ_INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// The integer at or below; |v| < 2^31.
DQ_INLINE vi floor_to_int(vf v) {
    const vi toward_zero = __builtin_convertvector(v, vi);
    return toward_zero + (to_floats(toward_zero) > v);  // true is -1
}

DQ_INLINE vi between(vi v, int32_t least, int32_t most) {
    const vi low = vi{} + least, high = vi{} + most;
    v = v < low ? low : v;
    return v > high ? high : v;
}

template <typename Out>
void latent_rows(const LatentWeight& w, Out* out, int64_t begin, int64_t end) {
    const int64_t groups = w.scale.k / w.scale.group_size, size = w.scale.group_size;
    const int shift = 16 - w.bits, middle = 1 << (w.bits - 1);
    for (int64_t at = begin * groups; at < end * groups; ++at) {
        const float scale = scale_at(w.scale, at);
        const int zero = w.zero ? w.zero[at] : middle;
        const int16_t* u = w.u + at * size;
        Out* to = out + at * size;
        for_each_vector(size, [&](int64_t i, int lanes) {
            const vi code = (load_ints(u + i, lanes) >> shift) + middle;
            store_some(to + i, to_floats(code - zero) * scale, lanes);
        });
    }
}

void latent_weight(const LatentWeight& w, int64_t begin, int64_t end) {
    if (w.out_is_bf16) return latent_rows(w, static_cast<uint16_t*>(w.out), begin, end);
    latent_rows(w, static_cast<float*>(w.out), begin, end);
}

template <typename Grad>
float largest_magnitude(const Grad* grad, int64_t count) {
    vf largest = vf{};
    for_each_vector(count, [&](int64_t i, int lanes) {
        const vf g = abs(load_some(grad + i, lanes));
        largest = max(largest, select(g == g, g, splat(INFINITY)));
    });
    return max_of(largest);
}

float latent_largest(const LatentState& s, int64_t begin, int64_t end) {
    const int64_t from = begin * s.k, count = (end - begin) * s.k;
    return s.grad_is_bf16 ? largest_magnitude(static_cast<const uint16_t*>(s.grad) + from, count)
                          : largest_magnitude(static_cast<const float*>(s.grad) + from, count);
}

template <typename Grad>
void step_row(const LatentState& s, const LatentStep& h, const Grad* all, int64_t row) {
    int16_t* u_row = s.u + row * s.k;
    int8_t* m_row = s.m + row * s.k;
    uint8_t* v_row = s.v + row * s.k;
    const Grad* grad = all + row * s.k;
    const vf least = bits_to_float(vi{} + (h.lowest_after << kMantissaDropped));
    const vi known = vi{} - (h.held != 0.0f);  // before the first step v is 0, not what a byte of 0 stands for
    for_each_vector(s.k, [&](int64_t i, int lanes) {
        const auto dither = [&](int draw) {
            const vf r = s.row[draw * s.n + row] + load_some(s.column + draw * s.k + i, lanes);
            return r - select(r >= 1.0f, splat(1.0f), vf{});
        };
        const vf g = load_some(grad + i, lanes);
        const vf before = bits_to_float(((load_ints(v_row + i, lanes) + h.lowest) << kMantissaDropped) & known);
        const vf m = to_floats(load_ints(m_row + i, lanes)) * (sqrt(before) * h.held);
        const vf v = max(before * h.beta2 + (g * g) * h.rest2, least);
        const vf share = (m * h.beta1 + g * h.rest1) / sqrt(v) * h.correction;
        store_ints(m_row + i, between(floor_to_int(share * h.per_share + dither(0)), -127, 127), lanes);
        const vi dropped = __builtin_convertvector(dither(1) * static_cast<float>(1 << kMantissaDropped), vi);
        const vi top = ((bits_of(v) + dropped) >> kMantissaDropped) - h.lowest_after;
        store_ints(v_row + i, between(top, 0, 255), lanes);
        const vf moved = to_floats(load_ints(u_row + i, lanes)) + (dither(2) - h.rate * share);
        store_ints(u_row + i, between(floor_to_int(moved), INT16_MIN, INT16_MAX), lanes);
    });
}

void latent_step(const LatentState& s, const LatentStep& step, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        if (s.grad_is_bf16) {
            step_row(s, step, static_cast<const uint16_t*>(s.grad), row);
        } else {
            step_row(s, step, static_cast<const float*>(s.grad), row);
        }
    }
}

constexpr LatentKernels kLatentPasses = {latent_weight, latent_largest, latent_step};

}  // namespace
}  // namespace dq

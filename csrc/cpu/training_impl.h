// The projected AdamW step over one range, written once over vec.h.
#pragma once

#include <cmath>

#include "training.h"
#include "vec.h"

namespace dq {
namespace {

// One vector of W weights; returns -1 in the lanes that stay undecided.
DQ_INLINE vi adam_vector(const AdamState& s, const AdamStep& h) {
    vf g = load(s.grad) * h.kl_weight;
    g = max(min(g, splat(h.clamp)), splat(-h.clamp));
    g = ((g + 1.0f) - 2.0f * load(s.y)) * load_bytes(s.free);
    const vf m = load(s.m) + (1.0f - h.beta1) * (g - load(s.m));
    const vf v = load(s.v) * h.beta2 + (1.0f - h.beta2) * (g * g);
    store(s.m, m);
    store(s.v, v);
    const vf denominator = sqrt(v) / h.root_correction + h.epsilon;
    vf x = load(s.x) * h.decay - h.rate * (m / denominator);
    x = max(min(x, splat(1.0f)), vf{});
    store(s.x, x);
    return (x > 0.01f) & (x < 0.99f);
}

int64_t adam(const AdamState& state, int64_t count, const AdamStep& step) {
    int64_t undecided = 0, i = 0;
    while (i + W <= count) {
        vi lanes = vi{};
        // A lane counts down by one a vector, and is emptied long before it could overflow.
        for (int64_t n = 0; n < (1 << 20) && i + W <= count; ++n, i += W) lanes += adam_vector(state.from(i), step);
        for (int j = 0; j < W; ++j) undecided -= lanes[j];
    }
    if (i == count) return undecided;
    float x[W] = {}, m[W] = {}, v[W] = {}, grad[W] = {}, y[W] = {};  // the last few, in a vector of their own
    uint8_t free[W] = {};
    const AdamState rest = state.from(i);
    const auto size = static_cast<size_t>(count - i);
    const size_t bytes = size * sizeof(float);
    std::memcpy(x, rest.x, bytes);
    std::memcpy(m, rest.m, bytes);
    std::memcpy(v, rest.v, bytes);
    std::memcpy(grad, rest.grad, bytes);
    std::memcpy(y, rest.y, bytes);
    std::memcpy(free, rest.free, size);
    const vi lanes = adam_vector({x, m, v, grad, y, free}, step);
    for (size_t j = 0; j < size; ++j) undecided -= lanes[j];
    std::memcpy(rest.x, x, bytes);
    std::memcpy(rest.m, m, bytes);
    std::memcpy(rest.v, v, bytes);
    return undecided;
}

}  // namespace
}  // namespace dq

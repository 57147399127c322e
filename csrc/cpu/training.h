// Two memory-bound passes of a DiscQuant step, each fused into one: dq_runtime/backends/training_reference.py defines
// them.
#pragma once

#include <cstdint>

namespace dq {

// Of one projected AdamW step; see AdamStep in dq_runtime/rounding/base.py.
struct AdamStep {
    float kl_weight, clamp, beta1, beta2, epsilon;
    float decay;            // 1 - lr * weight_decay
    float rate;             // lr / (1 - beta1^step)
    float root_correction;  // sqrt(1 - beta2^step)
};

// The state of some weights: x, m, v are updated in place.
struct AdamState {
    float *x, *m, *v;
    const float *grad, *y;
    const uint8_t* free;  // 0 or 1

    AdamState from(int64_t i) const { return {x + i, m + i, v + i, grad + i, y + i, free + i}; }
};

// One step of `count` weights; returns how many x are undecided, strictly between 0.01 and 0.99.
int64_t projected_adam(const AdamState& state, int64_t count, const AdamStep& step, int threads);

// out[n][k] = scale * (lo - zero + x), rounded as that chain of float32 operations: (x + lo) - zero, times scale.
// lo uint8 and x float32 [n, k], scale 16-bit and zero uint8 [n, k / group_size]; zero nullptr: `middle` everywhere.
struct LerpWeight {
    const uint8_t* lo;
    const float* x;
    const uint16_t* scale;
    bool scale_is_bf16;
    const uint8_t* zero;
    int middle;
    int64_t n, k, group_size;
};
void lerp_weight(const LerpWeight& w, float* out, int threads);

}  // namespace dq

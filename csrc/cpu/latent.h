// The passes over a four-byte latent, each fused into one: dq_runtime/rounding/latent.py and byte_moments.py define
// them. Matrices are row-major [n, k]; a result never depends on the number of threads.
#pragma once

#include <cstdint>

#include "training.h"

namespace dq {

// out = scale * (code(u) - zero), rounded once; code(u) are the first `bits` bits of u + 2^15. zero uint8 like the
// scales; nullptr: the middle code everywhere.
struct LatentWeight {
    GroupScales scale;
    const int16_t* u;
    const uint8_t* zero;
    int bits;
    void* out;
    bool out_is_bf16;  // else float32
};

// What a step reads and, in place, writes. The stochastic rounding adds frac(row[d][n] + column[d][k]) in [0, 1), with
// d = 0 for m, 1 for v, 2 for u.
struct LatentState {
    int64_t n, k;
    int16_t* u;
    int8_t* m;
    uint8_t* v;
    const void* grad;
    bool grad_is_bf16;    // else float32
    const float* row;     // [3, n]
    const float* column;  // [3, k]
};

// One step of Adam. v is held as the top 12 bits of a float32 less those of `lowest`, m as a share of sqrt(v).
struct LatentStep {
    float beta1, rest1, beta2, rest2;  // rest = 1 - beta, of which float32 would keep five digits
    float held;       // what a unit of m is worth, in sqrt(v), before the step; 0 before the first
    int32_t lowest;   // the top bits that a held v of 0 stands for, before the step
    int32_t lowest_after;
    float correction; // of Adam's bias, after the step
    float per_share;  // units of m, after the step, that corrected m / sqrt(v) = 1 has
    float rate;       // units of u
};

// What one instruction set offers, in one thread: rows begin .. end-1.
struct LatentKernels {
    void (*weight)(const LatentWeight& w, int64_t begin, int64_t end);
    float (*largest)(const LatentState& s, int64_t begin, int64_t end);  // of |grad|; infinity for a NaN
    void (*step)(const LatentState& s, const LatentStep& step, int64_t begin, int64_t end);
};

void latent_weight(const LatentWeight& w, int threads);
float latent_largest(const LatentState& s, int threads);
void latent_step(const LatentState& s, const LatentStep& step, int threads);

}  // namespace dq

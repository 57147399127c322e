// What stands between the matrix products of a Llama-like layer, forward and backward, each in one pass over memory:
// residual add with RMS norm, and silu(gate) * up. Arithmetic is float32; the residual stream is float32, what products
// take and give bfloat16 or float32.
#pragma once

#include <cstdint>

namespace dq {

// sum = x + delta;  rate = 1 / sqrt(mean(sum^2) + eps);  out = weight * (sum * rate). Matrices [rows, width].
struct NormForward {
    int64_t rows, width;
    bool bf16;          // delta and out; else float32
    float eps;
    const float* x;
    const void* delta;  // nullptr: sum is x, and not written
    const float* weight;
    float* sum;
    void* out;
    float* rate;        // [rows]
};

// For gradients to out and to sum: grad_x, and the same rounded to delta's dtype.
struct NormBackward {
    int64_t rows, width;
    bool bf16;              // grad, grad_delta
    const void* grad;
    const float* grad_sum;  // nullptr: none
    const float *sum, *weight, *rate;
    float* grad_x;          // may be grad_sum
    void* grad_delta;       // nullptr: not wanted
};

// out = silu(gate) * up, and its gradients for `grad`; all of one dtype, `count` elements.
struct GatedForward {
    int64_t count;
    bool bf16;
    const void *gate, *up;
    void* out;
};
struct GatedBackward {
    int64_t count;
    bool bf16;
    const void *grad, *gate, *up;
    void *grad_gate, *grad_up;
};

// What one instruction set offers, in one thread: rows or elements begin .. end-1.
struct RowKernels {
    void (*norm)(const NormForward& n, int64_t begin, int64_t end);
    void (*norm_backward)(const NormBackward& n, int64_t begin, int64_t end);
    void (*gated)(const GatedForward& g, int64_t begin, int64_t end);
    void (*gated_backward)(const GatedBackward& g, int64_t begin, int64_t end);
};

void norm_forward(const NormForward& n, int threads);
void norm_backward(const NormBackward& n, int threads);
void gated_forward(const GatedForward& g, int threads);
void gated_backward(const GatedBackward& g, int threads);

}  // namespace dq

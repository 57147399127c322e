// Causal attention of one sequence for training, with rotary embedding and shared key heads: forward and backward, in
// tiles of 64 x 64 scores that are never stored (FlashAttention-2, arXiv 2307.08691). Arithmetic is float32, whatever
// the tensors are.
#pragma once

#include <cstdint>

namespace dq {

constexpr int64_t kTokenTile = 64;

// Head h of a row [heads * dim] is its columns h * dim .. ; head h reads key head h / (heads / key_heads).
struct AttentionShape {
    int64_t tokens, heads, key_heads, dim;  // dim: a multiple of 32, so that half a head is whole vectors

    int64_t tiles() const { return (tokens + kTokenTile - 1) / kTokenTile; }
    int64_t padded() const { return tiles() * kTokenTile; }      // rows beyond tokens are zero in every workspace
    int64_t head_size() const { return padded() * dim; }         // floats of one head in a workspace
    int64_t tile_size() const { return kTokenTile * dim; }
    int64_t group() const { return heads / key_heads; }
};

// q, out [tokens, heads * dim], k, v [tokens, key_heads * dim], all bfloat16 or all float32. q and k are turned as
// transformers turns them: q * cosine + rotate_half(q) * sine with cosine, sine float32 [tokens, dim].
struct AttentionForward {
    AttentionShape shape;
    const void *q, *k, *v;
    bool bf16;
    const float *cosine, *sine;
    float scale;           // of the scores
    void* out;
    float* log_sum;        // [heads, padded]: log(sum(exp(scores)))
    float* workspace;      // forward_floats(shape)
};

// Gradients to q, k, v of sum(grad * out), in their dtype; `forward` holds what the forward pass was given and gave.
struct AttentionBackward {
    AttentionForward forward;
    const void* grad;
    void *grad_q, *grad_k, *grad_v;
};

inline int64_t forward_floats(const AttentionShape& s) { return 2 * s.key_heads * s.head_size(); }

// Key tiles are dealt to two parts of about equal work, 0 1 1 0 0 1 1 0 ..: with 9 heads two threads would otherwise
// share them 5 to 4. Each part sums its own gradient to q.
constexpr int64_t kParts = 2;
inline int64_t part_of(int64_t key_tile) { return (key_tile + 1) / 2 % kParts; }

// Where the backward pass keeps what, each [heads or key_heads][padded, dim] float32 but the last.
struct AttentionWorkspace {
    float *q, *grad;                 // turned and scaled; widened
    float *k, *k_turned, *v_turned;  // the latter two tile by tile as [dim][64]
    float *grad_q, *grad_k, *grad_v; // of each head; grad_q: [part][head]
    float* delta;                    // [heads][padded]: sum(grad * out) of a row

    static int64_t floats(const AttentionShape& s) {
        return ((4 + kParts) * s.heads + 3 * s.key_heads) * s.head_size() + s.heads * s.padded();
    }
    AttentionWorkspace(const AttentionShape& s, float* at) {
        const int64_t all = s.heads * s.head_size(), shared = s.key_heads * s.head_size();
        q = at;
        grad = q + all;
        k = grad + all;
        k_turned = k + shared;
        v_turned = k_turned + shared;
        grad_q = v_turned + shared;
        grad_k = grad_q + kParts * all;
        grad_v = grad_k + all;
        delta = grad_v + all;
    }
};

// What one instruction set offers, in one thread. A tile is 64 tokens of one head.
struct AttentionKernels {
    void (*prepare_keys)(const AttentionForward& a, int64_t key_head, int64_t tile);
    void (*forward)(const AttentionForward& a, int64_t head, int64_t tile);
    void (*prepare_backward_keys)(const AttentionBackward& a, int64_t key_head, int64_t tile);
    void (*prepare_backward)(const AttentionBackward& a, int64_t head, int64_t tile);
    void (*backward)(const AttentionBackward& a, int64_t head, int64_t part);
    void (*finish_keys)(const AttentionBackward& a, int64_t key_head, int64_t tile);
    void (*finish)(const AttentionBackward& a, int64_t head, int64_t tile);
};

// A result does not depend on the number of threads.
void attention_forward(const AttentionForward& a, int threads);
void attention_backward(const AttentionBackward& a, int threads);

}  // namespace dq

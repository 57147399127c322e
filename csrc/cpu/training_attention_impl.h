// The passes of training_attention.h, written once over vec.h.
#pragma once

#include <cmath>
#include <type_traits>

#include "training_attention.h"
#include "training_impl.h"

namespace dq {
namespace {

// A block of a product in registers: 4 x 4 vectors where there are 32 of them, else 4 x 2.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif
constexpr int kBlockRows = 4;

// An operand read one number at a time: element (row, i) of the sum is at[row * row_step + i * step].
struct Left {
    const float* at;
    int64_t row_step, step;
};

template <int Vectors>
DQ_INLINE void product_block(Left a, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
                             bool add) {
    vf sums[kBlockRows][Vectors];
    for (int r = 0; r < kBlockRows; ++r) {
        for (int v = 0; v < Vectors; ++v) sums[r][v] = add ? load(c + r * c_stride + v * W) : vf{};
    }
    for (int64_t i = 0; i < depth; ++i) {
        vf right[Vectors];
        for (int v = 0; v < Vectors; ++v) right[v] = load(b + i * b_stride + v * W);
        for (int r = 0; r < kBlockRows; ++r) {
            const vf left = splat(a.at[r * a.row_step + i * a.step]);
            for (int v = 0; v < Vectors; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
        }
    }
    for (int r = 0; r < kBlockRows; ++r) {
        for (int v = 0; v < Vectors; ++v) store(c + r * c_stride + v * W, sums[r][v]);
    }
}

// c [64, columns] = or += a [64, depth] @ b [depth, columns]; b and c with as many floats between rows as columns.
void product(Left a, const float* b, int64_t depth, float* c, int64_t columns, bool add) {
    int64_t column = 0;
    const auto blocks = [&](auto vectors) {
        for (int64_t row = 0; row < kTokenTile; row += kBlockRows) {
            const Left rows = {a.at + row * a.row_step, a.row_step, a.step};
            product_block<vectors()>(rows, b + column, columns, depth, c + row * columns + column, columns, add);
        }
        column += vectors() * W;
    };
    while (column + kBlockVectors * W <= columns) blocks(std::integral_constant<int, kBlockVectors>{});
    while (column < columns) blocks(std::integral_constant<int, 1>{});
}

// The tokens of a tile that there are.
inline int64_t tokens_of(const AttentionShape& s, int64_t tile) {
    const int64_t left = s.tokens - tile * kTokenTile;
    return left < kTokenTile ? left : kTokenTile;
}

// Columns `head` of the tile's rows of in [tokens, heads * dim] as float32 [64, dim], zero beyond the last token.
template <typename T>
void widen_tile(const AttentionShape& s, const T* in, int64_t heads, int64_t head, int64_t tile, float* out) {
    const int64_t count = tokens_of(s, tile);
    for (int64_t row = 0; row < kTokenTile; ++row, out += s.dim) {
        const T* from = in + ((tile * kTokenTile + row) * heads + head) * s.dim;
        for (int64_t d = 0; d < s.dim; d += W) store(out + d, row < count ? load_some(from + d, W) : vf{});
    }
}

// The same, turned by the rotary embedding and scaled.
template <typename T>
void turn_tile(const AttentionForward& a, const T* in, int64_t heads, int64_t head, int64_t tile, float scale,
               float* out) {
    const int64_t dim = a.shape.dim, half = dim / 2, count = tokens_of(a.shape, tile);
    widen_tile(a.shape, in, heads, head, tile, out);
    for (int64_t row = 0; row < count; ++row, out += dim) {
        const float* cosine = a.cosine + (tile * kTokenTile + row) * dim;
        const float* sine = a.sine + (tile * kTokenTile + row) * dim;
        for (int64_t d = 0; d < half; d += W) {
            const vf low = load(out + d), high = load(out + half + d);
            store(out + d, (low * load(cosine + d) - high * load(sine + d)) * scale);
            store(out + half + d, (high * load(cosine + half + d) + low * load(sine + half + d)) * scale);
        }
    }
}

// The gradient behind turn_tile, from that to its result, [64, dim] and lost.
template <typename T>
void turn_back(const AttentionForward& a, float* grad, int64_t heads, int64_t head, int64_t tile, float scale, T* out) {
    const int64_t dim = a.shape.dim, half = dim / 2, count = tokens_of(a.shape, tile);
    for (int64_t row = 0; row < count; ++row, grad += dim) {
        const float* cosine = a.cosine + (tile * kTokenTile + row) * dim;
        const float* sine = a.sine + (tile * kTokenTile + row) * dim;
        T* to = out + ((tile * kTokenTile + row) * heads + head) * dim;
        for (int64_t d = 0; d < half; d += W) {
            const vf low = load(grad + d) * scale, high = load(grad + half + d) * scale;
            store_some(to + d, low * load(cosine + d) + high * load(sine + half + d), W);
            store_some(to + half + d, high * load(cosine + half + d) - low * load(sine + d), W);
        }
    }
}

// in [64, dim] -> out [dim, 64].
void transpose_tile(const float* in, int64_t dim, float* out) {
    for (int64_t row = 0; row < kTokenTile; ++row) {
        for (int64_t d = 0; d < dim; ++d) out[d * kTokenTile + row] = in[row * dim + d];
    }
}

// Key and value heads are small: at most 256 columns go through the stack.
constexpr int64_t kMostDim = 256;

template <typename T>
void prepare_keys_of(const AttentionForward& a, int64_t head, int64_t tile) {
    const AttentionShape& s = a.shape;
    float* turned = a.workspace + head * s.head_size() + tile * s.tile_size();
    float* values = turned + s.key_heads * s.head_size();
    alignas(64) float keys[kTokenTile * kMostDim];
    turn_tile(a, static_cast<const T*>(a.k), s.key_heads, head, tile, 1.0f, keys);
    transpose_tile(keys, s.dim, turned);
    widen_tile(s, static_cast<const T*>(a.v), s.key_heads, head, tile, values);
}

// Scores of queries that come before their key.
DQ_INLINE void mask(float* scores, float value) {
    for (int64_t row = 0; row < kTokenTile; ++row) {
        for (int64_t key = row + 1; key < kTokenTile; ++key) scores[row * kTokenTile + key] = value;
    }
}

template <typename T>
void forward_of(const AttentionForward& a, int64_t head, int64_t tile) {
    const AttentionShape& s = a.shape;
    const float* keys = a.workspace + head / s.group() * s.head_size();
    const float* values = keys + s.key_heads * s.head_size();
    alignas(64) float q[kTokenTile * kMostDim], out[kTokenTile * kMostDim], scores[kTokenTile * kTokenTile];
    float top[kTokenTile], total[kTokenTile];
    turn_tile(a, static_cast<const T*>(a.q), s.heads, head, tile, a.scale, q);
    for (int64_t seen = 0; seen <= tile; ++seen) {
        product({q, s.dim, 1}, keys + seen * s.tile_size(), s.dim, scores, kTokenTile, false);
        if (seen == tile) mask(scores, -INFINITY);
        for (int64_t row = 0; row < kTokenTile; ++row) {
            float* score = scores + row * kTokenTile;
            vf most = seen ? splat(top[row]) : load(score);
            for (int64_t i = 0; i < kTokenTile; i += W) most = max(load(score + i), most);
            const float best = max_of(most);
            vf sum = vf{};
            for (int64_t i = 0; i < kTokenTile; i += W) {
                const vf e = exp_or_nan(load(score + i) - best);
                store(score + i, e);
                sum += e;
            }
            const float factor = seen ? exp(splat(top[row] - best))[0] : 0.0f;
            if (seen && factor != 1.0f) {
                for (int64_t d = 0; d < s.dim; d += W) store(out + row * s.dim + d, load(out + row * s.dim + d) * factor);
            }
            total[row] = (seen ? total[row] * factor : 0.0f) + sum_of(sum);
            top[row] = best;
        }
        product({scores, kTokenTile, 1}, values + seen * s.tile_size(), kTokenTile, out, s.dim, seen > 0);
    }
    float* log_sum = a.log_sum + head * s.padded() + tile * kTokenTile;
    for (int64_t row = 0; row < kTokenTile; ++row) log_sum[row] = top[row] + std::log(total[row]);
    for (int64_t row = 0; row < tokens_of(s, tile); ++row) {
        T* to = static_cast<T*>(a.out) + ((tile * kTokenTile + row) * s.heads + head) * s.dim;
        for (int64_t d = 0; d < s.dim; d += W) store_some(to + d, load(out + row * s.dim + d) / total[row], W);
    }
}

template <typename T>
void prepare_backward_keys_of(const AttentionBackward& a, int64_t head, int64_t tile) {
    const AttentionShape& s = a.forward.shape;
    const AttentionWorkspace w(s, a.forward.workspace);
    const int64_t at = head * s.head_size() + tile * s.tile_size();
    alignas(64) float values[kTokenTile * kMostDim];
    turn_tile(a.forward, static_cast<const T*>(a.forward.k), s.key_heads, head, tile, 1.0f, w.k + at);
    transpose_tile(w.k + at, s.dim, w.k_turned + at);
    widen_tile(s, static_cast<const T*>(a.forward.v), s.key_heads, head, tile, values);
    transpose_tile(values, s.dim, w.v_turned + at);
}

template <typename T>
void prepare_backward_of(const AttentionBackward& a, int64_t head, int64_t tile) {
    const AttentionShape& s = a.forward.shape;
    const AttentionWorkspace w(s, a.forward.workspace);
    const int64_t at = head * s.head_size() + tile * s.tile_size();
    alignas(64) float out[kTokenTile * kMostDim];
    turn_tile(a.forward, static_cast<const T*>(a.forward.q), s.heads, head, tile, a.forward.scale, w.q + at);
    widen_tile(s, static_cast<const T*>(a.grad), s.heads, head, tile, w.grad + at);
    widen_tile(s, static_cast<const T*>(a.forward.out), s.heads, head, tile, out);
    for (int64_t row = 0; row < kTokenTile; ++row) {
        vf sum = vf{};
        for (int64_t d = row * s.dim; d < (row + 1) * s.dim; d += W) sum += load(w.grad + at + d) * load(out + d);
        w.delta[head * s.padded() + tile * kTokenTile + row] = sum_of(sum);
    }
}

// With P = exp(scores - log_sum):  grad_v = P^T grad,  grad_scores = P * (grad v^T - delta),  grad_k = grad_scores^T q,
// grad_q = grad_scores k. All key tiles of one part against the queries that see them.
void attend_backward(const AttentionBackward& a, int64_t head, int64_t part) {
    const AttentionShape& s = a.forward.shape;
    const AttentionWorkspace w(s, a.forward.workspace);
    const int64_t own = head * s.head_size(), shared = head / s.group() * s.head_size();
    const float *log_sum = a.forward.log_sum + head * s.padded(), *delta = w.delta + head * s.padded();
    float* grad_q = w.grad_q + part * s.heads * s.head_size() + own;
    alignas(64) float p[kTokenTile * kTokenTile], grad_p[kTokenTile * kTokenTile];
    for (int64_t key = 0; key < s.tiles(); ++key) {
        if (part_of(key) != part) continue;
        const int64_t k = shared + key * s.tile_size();
        float *grad_k = w.grad_k + own + key * s.tile_size(), *grad_v = w.grad_v + own + key * s.tile_size();
        for (int64_t query = key; query < s.tiles(); ++query) {
            const int64_t at = own + query * s.tile_size();
            product({w.q + at, s.dim, 1}, w.k_turned + k, s.dim, p, kTokenTile, false);
            product({w.grad + at, s.dim, 1}, w.v_turned + k, s.dim, grad_p, kTokenTile, false);
            if (query == key) mask(p, -INFINITY);
            for (int64_t row = 0; row < kTokenTile; ++row) {
                const float sum = log_sum[query * kTokenTile + row], mean = delta[query * kTokenTile + row];
                for (int64_t i = row * kTokenTile; i < (row + 1) * kTokenTile; i += W) {
                    const vf e = exp_or_nan(load(p + i) - sum);
                    store(p + i, e);
                    store(grad_p + i, e * (load(grad_p + i) - mean));
                }
            }
            product({p, 1, kTokenTile}, w.grad + at, kTokenTile, grad_v, s.dim, query > key);
            product({grad_p, 1, kTokenTile}, w.q + at, kTokenTile, grad_k, s.dim, query > key);
            // Tile 0 and tile 1 are the first of their parts.
            product({grad_p, kTokenTile, 1}, w.k + k, kTokenTile, grad_q + query * s.tile_size(), s.dim, key > 1);
        }
    }
}

// sum[64, dim] += other.
DQ_INLINE void add_tile(float* sum, const float* other, int64_t size) {
    for (int64_t i = 0; i < size; i += W) store(sum + i, load(sum + i) + load(other + i));
}

template <typename T>
void finish_keys_of(const AttentionBackward& a, int64_t head, int64_t tile) {
    const AttentionShape& s = a.forward.shape;
    const AttentionWorkspace w(s, a.forward.workspace);
    const int64_t first = head * s.group() * s.head_size() + tile * s.tile_size();
    float *k = w.grad_k + first, *v = w.grad_v + first;
    for (int64_t i = 1; i < s.group(); ++i) {
        add_tile(k, k + i * s.head_size(), s.tile_size());
        add_tile(v, v + i * s.head_size(), s.tile_size());
    }
    turn_back(a.forward, k, s.key_heads, head, tile, 1.0f, static_cast<T*>(a.grad_k));
    for (int64_t row = 0; row < tokens_of(s, tile); ++row) {
        T* to = static_cast<T*>(a.grad_v) + ((tile * kTokenTile + row) * s.key_heads + head) * s.dim;
        for (int64_t d = 0; d < s.dim; d += W) store_some(to + d, load(v + row * s.dim + d), W);
    }
}

template <typename T>
void finish_of(const AttentionBackward& a, int64_t head, int64_t tile) {
    const AttentionShape& s = a.forward.shape;
    const AttentionWorkspace w(s, a.forward.workspace);
    float* sum = w.grad_q + head * s.head_size() + tile * s.tile_size();
    // The first tile of queries sees the first tile of keys only, which is in the first part.
    if (tile > 0) add_tile(sum, sum + s.heads * s.head_size(), s.tile_size());
    turn_back(a.forward, sum, s.heads, head, tile, a.forward.scale, static_cast<T*>(a.grad_q));
}

void prepare_keys(const AttentionForward& a, int64_t head, int64_t tile) {
    a.bf16 ? prepare_keys_of<uint16_t>(a, head, tile) : prepare_keys_of<float>(a, head, tile);
}
void attend_forward(const AttentionForward& a, int64_t head, int64_t tile) {
    a.bf16 ? forward_of<uint16_t>(a, head, tile) : forward_of<float>(a, head, tile);
}
void prepare_backward_keys(const AttentionBackward& a, int64_t head, int64_t tile) {
    a.forward.bf16 ? prepare_backward_keys_of<uint16_t>(a, head, tile) : prepare_backward_keys_of<float>(a, head, tile);
}
void prepare_backward(const AttentionBackward& a, int64_t head, int64_t tile) {
    a.forward.bf16 ? prepare_backward_of<uint16_t>(a, head, tile) : prepare_backward_of<float>(a, head, tile);
}
void finish_keys(const AttentionBackward& a, int64_t head, int64_t tile) {
    a.forward.bf16 ? finish_keys_of<uint16_t>(a, head, tile) : finish_keys_of<float>(a, head, tile);
}
void finish(const AttentionBackward& a, int64_t head, int64_t tile) {
    a.forward.bf16 ? finish_of<uint16_t>(a, head, tile) : finish_of<float>(a, head, tile);
}

constexpr AttentionKernels kAttention = {prepare_keys,    attend_forward, prepare_backward_keys, prepare_backward,
                                         attend_backward, finish_keys,    finish};

}  // namespace
}  // namespace dq

// Attention, written once over vec.h. Positions are taken in tiles of 64: scores, running softmax, weighted values.
// Keys lie 16 positions to a block, so scores need no sum across lanes; rows (tokens x heads that share the keys) are
// taken up to 8 at a time, so that a key or value is loaded and converted once for all of them.
#pragma once

#include <cmath>
#include <type_traits>

#include "attention.h"
#include "vec.h"

namespace dq {
namespace {

template <bool Half>
struct Element;
template <>
struct Element<true> {
    using Type = uint16_t;
    static DQ_INLINE vf read(const uint16_t* p) { return load_half(p); }
    static DQ_INLINE void write(uint16_t* p, vf v) { store_half(p, v); }
};
template <>
struct Element<false> {
    using Type = float;
    static DQ_INLINE vf read(const float* p) { return load(p); }
    static DQ_INLINE void write(float* p, vf v) { store(p, v); }
};

// The tile that holds a position: its keys, and kScoreTile * dim further its values.
template <bool Half>
DQ_INLINE typename Element<Half>::Type* tile_at(const KeyValue& cache, int64_t position) {
    const int64_t tile = cache.blocks[position / kScoreTile % cache.tiles];
    return reinterpret_cast<typename Element<Half>::Type*>(cache.base + tile * cache.stride);
}

constexpr int kScoreRows = 8;
// Accumulators of the value product: 4 rows x 4 vectors.
constexpr int kValueRows = 4, kValueVectors = 4;

// Keys or values of one tile and how far ahead, in bytes, those lie that are read next: the hardware's prefetchers stop
// at every jump between tiles. Into the second-level cache: a Zen 4 core keeps far fewer lines in flight for its first
// (27 us a layer of 576 positions, 3 heads of 64, cold, against 45).
template <bool Half>
struct Source {
    const typename Element<Half>::Type* at;
    int64_t ahead;

    Source operator+(int64_t elements) const { return {at + elements, ahead}; }
    DQ_INLINE void prefetch(const typename Element<Half>::Type* p) const {
        __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead, 0, 2);
    }
};

// scores[r][16 * b ..] of `Rows` rows against `Blocks` blocks of keys. Several sums at once hide the latency of the
// multiply-add: 4 cycles, where one value of a key is ready each.
template <bool Half, int Rows, int Blocks>
DQ_INLINE void score_block(const float* const* q, Source<Half> keys, int64_t dim, float* scores, int64_t stride) {
    constexpr int kLine = Half ? 2 : 1;  // rows of 16 positions to a line of 64 bytes; dim is a multiple
    for (int part = 0; part < kPositions; part += W) {
        vf sums[Blocks][Rows];
        for (int b = 0; b < Blocks; ++b) {
            for (int r = 0; r < Rows; ++r) sums[b][r] = vf{};
        }
        for (int64_t d0 = 0; d0 < dim; d0 += kLine) {
            for (int b = 0; b < Blocks; ++b) keys.prefetch(keys.at + (b * dim + d0) * kPositions + part);
            for (int64_t d = d0; d < d0 + kLine; ++d) {
                vf key[Blocks];
                for (int b = 0; b < Blocks; ++b) key[b] = Element<Half>::read(keys.at + (b * dim + d) * kPositions + part);
                for (int r = 0; r < Rows; ++r) {
                    const vf value = splat(q[r][d]);
                    for (int b = 0; b < Blocks; ++b) sums[b][r] = fma(value, key[b], sums[b][r]);
                }
            }
        }
        for (int r = 0; r < Rows; ++r) {
            for (int b = 0; b < Blocks; ++b) store(scores + r * stride + b * kPositions + part, sums[b][r]);
        }
    }
}

// Scores of 8 rows against one block of keys; `turned` holds the rows' queries as [dim][8], one stream to read.
template <bool Half>
DQ_INLINE void score_turned(const float* turned, const typename Element<Half>::Type* keys, int64_t dim, float* scores,
                            int64_t stride) {
    for (int part = 0; part < kPositions; part += W) {
        vf sums[kScoreRows];
        for (int r = 0; r < kScoreRows; ++r) sums[r] = vf{};
        for (int64_t d = 0; d < dim; ++d) {
            const vf key = Element<Half>::read(keys + d * kPositions + part);
            for (int r = 0; r < kScoreRows; ++r) sums[r] = fma(splat(turned[d * kScoreRows + r]), key, sums[r]);
        }
        for (int r = 0; r < kScoreRows; ++r) store(scores + r * stride + part, sums[r]);
    }
}

// Few rows (a step of one token) take four blocks at once; many take one, so that a key is loaded once for 8 rows.
template <bool Half>
void score_rows(const float* const* q, const float* turned, int64_t rows, Source<Half> keys, int64_t dim, int64_t blocks,
                float* scores, int64_t stride) {
    int64_t r = 0;
    for (; r + kScoreRows <= rows; r += kScoreRows) {
        for (int64_t b = 0; b < blocks; ++b) {
            score_turned<Half>(turned + r * dim, keys.at + b * kPositions * dim, dim, scores + r * stride + b * kPositions,
                               stride);
        }
    }
    const auto rest = [&](auto count) {
        int64_t b = 0;
        float* to = scores + r * stride;
        for (; b + 4 <= blocks; b += 4) {
            score_block<Half, count(), 4>(q + r, keys + b * kPositions * dim, dim, to + b * kPositions, stride);
        }
        for (; b < blocks; ++b) {
            score_block<Half, count(), 1>(q + r, keys + b * kPositions * dim, dim, to + b * kPositions, stride);
        }
        r += count();
    };
    while (r + 4 <= rows) rest(std::integral_constant<int, 4>{});
    while (r + 3 <= rows) rest(std::integral_constant<int, 3>{});
    while (r < rows) rest(std::integral_constant<int, 1>{});
}

// Queries of whole groups of 8 rows as [group][dim][8].
inline void turn_queries(const float* const* q, int64_t rows, int64_t dim, float* turned) {
    for (int64_t r = 0; r + kScoreRows <= rows; r += kScoreRows, turned += kScoreRows * dim) {
        for (int64_t d = 0; d < dim; ++d) {
            for (int i = 0; i < kScoreRows; ++i) turned[d * kScoreRows + i] = q[r + i][d];
        }
    }
}

template <bool Half, int Rows, int Vectors>
DQ_INLINE void value_block(float* const* out, const float* weights, int64_t stride, Source<Half> values, int64_t dim,
                           int64_t positions) {
    constexpr int kLine = 64 / static_cast<int>(sizeof(typename Element<Half>::Type));
    vf sums[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < Vectors; ++v) sums[r][v] = load(out[r] + v * W);
    }
    const auto* at = values.at;
    for (int64_t p = 0; p < positions; ++p, at += dim) {
        vf value[Vectors];
        for (int v = 0; v < Vectors; ++v) value[v] = Element<Half>::read(at + v * W);
        if (Rows < kValueRows) {
            for (int line = 0; line < Vectors * W; line += kLine) values.prefetch(at + line);
        }
        for (int r = 0; r < Rows; ++r) {
            const vf weight = splat(weights[r * stride + p]);
            for (int v = 0; v < Vectors; ++v) sums[r][v] = fma(weight, value[v], sums[r][v]);
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < Vectors; ++v) store(out[r] + v * W, sums[r][v]);
    }
}

template <bool Half, int Rows>
void value_rows(float* const* out, const float* weights, int64_t stride, Source<Half> values, int64_t dim,
                int64_t positions) {
    float* to[Rows];
    for (int r = 0; r < Rows; ++r) to[r] = out[r];
    int64_t d = 0;
    const auto advance = [&](int64_t by) {
        d += by;
        for (int r = 0; r < Rows; ++r) to[r] += by;
    };
    for (; d + kValueVectors * W <= dim; advance(kValueVectors * W)) {
        value_block<Half, Rows, kValueVectors>(to, weights, stride, values + d, dim, positions);
    }
    for (; d < dim; advance(W)) value_block<Half, Rows, 1>(to, weights, stride, values + d, dim, positions);
}

// Masks, caps and exponentiates one row of scores in place; returns the factor for what was summed before.
inline float soften(float* scores, int64_t count, int64_t first_seen, int64_t last_seen, float softcap, float* top,
                    float* total) {
    if (softcap > 0.0f) {
        for (int64_t i = 0; i < count; i += W) store(scores + i, softcap * tanh(load(scores + i) / softcap));
    }
    for (int64_t i = 0; i < first_seen && i < count; ++i) scores[i] = -INFINITY;
    for (int64_t i = last_seen + 1 > 0 ? last_seen + 1 : 0; i < count; ++i) scores[i] = -INFINITY;
    vf most = splat(*top);
    for (int64_t i = 0; i < count; i += W) most = max(load(scores + i), most);
    const float best = max_of(most);
    if (best == -INFINITY) {  // nothing of this tile is seen, and nothing was before
        for (int64_t i = 0; i < count; ++i) scores[i] = 0.0f;
        return 1.0f;
    }
    vf sum = vf{};
    for (int64_t i = 0; i < count; i += W) {
        const vf e = exp(load(scores + i) - best);
        store(scores + i, e);
        sum += e;
    }
    const float factor = exp(splat(*top - best))[0];
    *top = best;
    *total = *total * factor + sum_of(sum);
    return factor;
}

template <bool Half>
void attend_in(const AttendUnit& u) {
    using Stored = typename Element<Half>::Type;
    const int64_t dim = u.cache.dim, rows = u.tokens * u.heads;
    constexpr int64_t kMostRows = kAttendRows;
    for (int64_t row0 = 0; row0 < rows; row0 += kMostRows) {
        const int64_t count = rows - row0 < kMostRows ? rows - row0 : kMostRows;
        const float* q[kMostRows];
        float* out[kMostRows];
        float top[kMostRows], total[kMostRows];
        for (int64_t r = 0; r < count; ++r) {
            const int64_t token = (row0 + r) / u.heads, head = (row0 + r) % u.heads;
            q[r] = u.q + token * u.token_stride + head * dim;
            out[r] = u.out + token * u.out_stride + head * dim;
            top[r] = -INFINITY;
            total[r] = 0.0f;
            std::memset(out[r], 0, static_cast<size_t>(dim) * sizeof(float));
        }
        float* turned = u.scratch + kMostRows * kScoreTile;
        turn_queries(q, count, dim, turned);
        const int64_t first_token = row0 / u.heads, last_token = (row0 + count - 1) / u.heads;
        int64_t begin = u.begin, end = u.end;
        if (end > u.position + last_token + 1) end = u.position + last_token + 1;
        if (u.window && begin < u.position + first_token - u.window + 1) begin = u.position + first_token - u.window + 1;
        // Tiles begin at multiples of their size and so never cross the end of a ring or block. A row's sums are the same
        // whichever rows it is taken with: positions that only those see add exact zeros, for scores outside of what a
        // row sees are masked, values at or beyond `end` are not read, and those before it are finite.
        const int64_t span = u.span;
        for (int64_t p = begin / kScoreTile * kScoreTile; p < end; p += span) {
            const int64_t seen = end - p < span ? end - p : span;
            const int64_t last = (seen - 1) / kScoreTile;  // tile of the span
            const auto keys_of = [&](int64_t t) { return tile_at<Half>(u.cache, p + t * kScoreTile); };
            const auto distance = [](const Stored* from, const Stored* to) {
                return reinterpret_cast<const char*>(to) - reinterpret_cast<const char*>(from);
            };
            for (int64_t t = 0; t <= last; ++t) {
                const Stored* keys = keys_of(t);
                const Stored* next = t < last ? keys_of(t + 1) : keys_of(0) + kScoreTile * dim;
                const int64_t here = t < last ? kScoreTile : seen - last * kScoreTile;
                score_rows<Half>(q, turned, count, {keys, distance(keys, next)}, dim, (here + kPositions - 1) / kPositions,
                                 u.scratch + t * kScoreTile, span);
            }
            const int64_t scored = (seen + kPositions - 1) / kPositions * kPositions;
            for (int64_t r = 0; r < count; ++r) {
                const int64_t now = u.position + (row0 + r) / u.heads;
                const int64_t oldest = u.window ? now - u.window + 1 : 0;
                const int64_t from = (oldest > u.begin ? oldest : u.begin) - p;
                const int64_t to = (now < u.end - 1 ? now : u.end - 1) - p;
                const float factor = soften(u.scratch + r * span, scored, from, to, u.softcap, top + r, total + r);
                if (factor != 1.0f) {
                    for (int64_t d = 0; d < dim; d += W) store(out[r] + d, load(out[r] + d) * factor);
                }
            }
            for (int64_t t = 0; t <= last; ++t) {
                const Stored* values = keys_of(t) + kScoreTile * dim;
                const Stored* next = t < last ? keys_of(t + 1) + kScoreTile * dim : keys_of(t + 1);
                const Source<Half> source{values, distance(values, next)};
                const int64_t here = t < last ? kScoreTile : seen - last * kScoreTile;
                const float* weights = u.scratch + t * kScoreTile;
                int64_t r = 0;
                for (; r + kValueRows <= count; r += kValueRows) {
                    value_rows<Half, kValueRows>(out + r, weights + r * span, span, source, dim, here);
                }
                for (; r + 3 <= count; r += 3) value_rows<Half, 3>(out + r, weights + r * span, span, source, dim, here);
                for (; r < count; ++r) value_rows<Half, 1>(out + r, weights + r * span, span, source, dim, here);
            }
        }
        for (int64_t r = 0; r < count; ++r) {
            const int64_t token = (row0 + r) / u.heads, head = (row0 + r) % u.heads;
            if (u.top != nullptr) {
                u.top[token * u.stat_stride + head] = top[r];
                u.total[token * u.stat_stride + head] = total[r];
            }
            if (u.normalise) {
                const float inverse = 1.0f / total[r];
                for (int64_t d = 0; d < dim; d += W) store(out[r] + d, load(out[r] + d) * inverse);
            }
        }
    }
}

void attend(const AttendUnit& unit) {
    if (unit.cache.is_half) {
        attend_in<true>(unit);
    } else {
        attend_in<false>(unit);
    }
}

template <bool Half>
void store_in(const float* key, const float* value, const KeyValue& cache, int64_t position) {
    using Stored = typename Element<Half>::Type;
    const int64_t dim = cache.dim, slot = position % kScoreTile;
    Stored* tile = tile_at<Half>(cache, position);
    Stored* keys = tile + slot / kPositions * kPositions * dim + slot % kPositions;
    Stored* values = tile + (kScoreTile + slot) * dim;
    for (int64_t d = 0; d < dim; d += W) {
        Stored lanes[W];
        Element<Half>::write(lanes, load(key + d));
        for (int i = 0; i < W; ++i) keys[(d + i) * kPositions] = lanes[i];
        Element<Half>::write(values + d, load(value + d));
    }
}

void store_key_value(const float* key, const float* value, const KeyValue& cache, int64_t position) {
    if (cache.is_half) {
        store_in<true>(key, value, cache, position);
    } else {
        store_in<false>(key, value, cache, position);
    }
}

}  // namespace
}  // namespace dq

// The matmuls, written once over the primitives of an `Isa` (isa_*.h). Included by one file per instruction set.
//
// Few tokens: a block of 16 rows is unpacked in registers and met by several tokens at once; the weights stream from
// memory once, and that stream is what a decode step costs. Many tokens: two blocks are unpacked into scratch (L1 or L2), and
// tiles of 6 tokens x 32 rows run over it.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "matmul_exact_impl.h"
#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {

// Bytes ahead in the codes, into the second-level cache: a Zen 4 core keeps far fewer lines in flight for its first.
constexpr int kPrefetch = 8192;

// One block (or the two of a tile) of finished products: bias, activation, store.
inline void finish(const Output& out, int64_t block, int64_t token, const float* gate, const float* up) {
    alignas(64) float product[kRows];
    std::memcpy(product, gate, sizeof product);
    if (out.bias != nullptr) {
        for (int r = 0; r < kRows; r += W) store(product + r, load(product + r) + load(out.bias + block * kRows + r));
    }
    int64_t row = block * kRows;
    if (out.epilogue != Epilogue::kStore) {
        alignas(64) float other[kRows];
        std::memcpy(other, up, sizeof other);
        if (out.bias != nullptr) {
            const float* bias = out.bias + (block + 1) * kRows;
            for (int r = 0; r < kRows; r += W) store(other + r, load(other + r) + load(bias + r));
        }
        for (int r = 0; r < kRows; r += W) {
            const vf v = load(product + r);
            store(product + r, (out.epilogue == Epilogue::kSiluMul ? silu(v) : gelu(v)) * load(other + r));
        }
        row /= 2;
    }
    float* y = out.y + token * out.stride + row;
    if (row + kRows <= out.n) {
        std::memcpy(y, product, sizeof product);
    } else {
        for (int64_t r = 0; row + r < out.n; ++r) y[r] = product[r];
    }
}

template <int Storage>
DQ_INLINE Isa::Ints first_sum(const Prepared& w, int64_t scale_at, int32_t sum) {
    return w.zero ? Isa::zero_times(w.zero + scale_at, -sum) : Isa::splat_int(-w.middle * sum);
}

// Codes just unpacked to the unsigned bytes that the integer products take: themselves, or their levels'.
template <int Storage>
DQ_INLINE void look_up(const Prepared& w, Isa::Quad* quads) {
    if constexpr (Storage == kTable) {
        for (int i = 0; i < quads_per_unit(kTable); ++i) quads[i] = Isa::look_up(quads[i], w.levels.bytes);
    }
}

// Scales of a group of a block, as the integer products want them.
template <int Storage>
DQ_INLINE Isa::Floats group_scale(const Prepared& w, int64_t scale_at) {
    const Isa::Floats scale = Isa::load16(w.scale + scale_at, w.is_bf16);
    if constexpr (Storage == kTable) return Isa::mul(scale, Isa::splat_float(w.levels.step));
    return scale;
}

template <int M>
DQ_INLINE int count_of(const Activations& a, int64_t token, int64_t g, Kind kind) {
    int count = 0;
    for (int m = 0; m < M; ++m) count += a.kind[(token + m) * a.groups + g] == kind;
    return count;
}

// out[m] += sums[m] * scale of the weight * scale of the activation, times the factor of the rest where `Rest`
template <int Storage, int M, bool Rest>
DQ_INLINE void add_group(const Isa::Sums<Storage>* sums, Isa::Floats scale, const Activations& a, int64_t token, int64_t g,
                         Isa::Floats* out) {
    for (int m = 0; m < M; ++m) {
        const int64_t at = (token + m) * a.groups + g;
        const Isa::Floats both = Isa::mul(scale, Isa::splat_float(Rest ? a.scale[at] * rest_factor(a.kind[at]) : a.scale[at]));
        out[m] = Isa::mul_add(Isa::to_float(sums[m]), both, out[m]);
    }
}

// Adds the products of the units of a group that `touched` names; `quads(unit, to)` gives a unit's.
template <int Storage, class Quads>
DQ_INLINE void add_touched(const Prepared& w, uint32_t touched, const int8_t* rest, Quads quads, Isa::Sums<Storage>& sums) {
    constexpr int kQuads = quads_per_unit(Storage);
    const int64_t per_bit = units_per_bit(w), units = w.padded / (4 * kQuads);
    for (; touched != 0; touched &= touched - 1) {
        int64_t unit = __builtin_ctz(touched) * per_bit;
        for (const int64_t end = unit + per_bit < units ? unit + per_bit : units; unit < end; ++unit) {
            Isa::Quad q[kQuads];
            quads(unit, q);
            for (int i = 0; i < kQuads; ++i) Isa::dot(sums, q[i], rest + 4 * (unit * kQuads + i));
            Isa::flush(sums);
        }
    }
}

// One group of one block with M tokens, codes unpacked in registers: the sums of q, and where Rest also those of the rest.
template <int Storage, int M, bool Rest>
DQ_INLINE const uint8_t* group_int8(const Prepared& w, const uint8_t* codes, const int8_t* const* x, int64_t to_rest,
                                    Isa::Sums<Storage>* sums, Isa::Sums<Storage>* rest) {
    constexpr int kQuads = quads_per_unit(Storage);
    constexpr int kStep = 8 / kQuads;  // units between two flushes: 8 quads fit the 16-bit sums of AVX2
    const int64_t units = w.padded / (4 * kQuads);
    int64_t at = 0;
    const auto unit = [&] {
        Isa::Quad quads[kQuads];
        if (Storage != 8) {  // 8 bits stream so fast that the hardware's own prefetching does better: 35 against 28 GB/s
            for (int line = 0; line < unit_bytes(Storage); line += 64) Isa::prefetch(codes + kPrefetch + line);
        }
        Isa::template unpack<Storage>(codes, quads);
        look_up<Storage>(w, quads);
        codes += unit_bytes(Storage);
        for (int i = 0; i < kQuads; ++i, at += 4) {
            for (int m = 0; m < M; ++m) {
                Isa::dot(sums[m], quads[i], x[m] + at);
                if (Rest) Isa::dot(rest[m], quads[i], x[m] + to_rest + at);
            }
        }
    };
    const auto flush = [&] {
        for (int m = 0; m < M; ++m) Isa::flush(sums[m]);
        for (int m = 0; Rest && m < M; ++m) Isa::flush(rest[m]);
    };
    int64_t u = 0;
    for (; u + kStep <= units; u += kStep) {
        for (int i = 0; i < kStep; ++i) unit();
        flush();
    }
    for (; u < units; ++u) {
        unit();
        flush();
    }
    return codes;
}

// Products of one block with M tokens. Where most tokens of a group are fine the rests are summed together, else each
// token's alone, unpacking again what of the group it needs.
template <int Storage, int M>
DQ_INLINE void block_int8(const Prepared& w, const Activations& a, int64_t block, int64_t token, Isa::Floats* out) {
    const uint8_t* codes = w.codes + block * w.block_bytes();
    const int8_t* x[M];
    for (int m = 0; m < M; ++m) {
        x[m] = a.q + (token + m) * a.columns;
        out[m] = Isa::splat_float(0.0f);
    }
    const int64_t to_rest = a.rest - a.q;
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t scale_at = (block * w.groups + g) * kRows;
        const bool together = 2 * count_of<M>(a, token, g, kFine) > M;
        const uint8_t* const group = codes;
        const Isa::Floats scale = group_scale<Storage>(w, scale_at);
        Isa::Sums<Storage> sums[M], rest[M];
        for (int m = 0; m < M; ++m) {
            Isa::start(sums[m], first_sum<Storage>(w, scale_at, a.sum[(token + m) * a.groups + g]));
        }
        if (together) {
            for (int m = 0; m < M; ++m) {
                Isa::start(rest[m], first_sum<Storage>(w, scale_at, a.rest_sum[(token + m) * a.groups + g]));
            }
            codes = group_int8<Storage, M, true>(w, codes, x, to_rest, sums, rest);
            add_group<Storage, M, false>(sums, scale, a, token, g, out);
            add_group<Storage, M, true>(rest, scale, a, token, g, out);
        } else {
            codes = group_int8<Storage, M, false>(w, codes, x, to_rest, sums, rest);
            add_group<Storage, M, false>(sums, scale, a, token, g, out);
            for (int m = 0; m < M; ++m) {
                const int64_t at = (token + m) * a.groups + g;
                if (a.kind[at] == kCoarse) continue;
                const int8_t* const alone = x[m] + to_rest;
                Isa::Sums<Storage> own;
                Isa::start(own, first_sum<Storage>(w, scale_at, a.rest_sum[at]));
                if (a.kind[at] == kFine) {
                    group_int8<Storage, 1, false>(w, group, &alone, 0, &own, &own);
                } else {
                    const auto unpacked = [&](int64_t unit, Isa::Quad* to) {
                        Isa::template unpack<Storage>(group + unit * unit_bytes(Storage), to);
                        look_up<Storage>(w, to);
                    };
                    add_touched<Storage>(w, a.touched[at], alone, unpacked, own);
                }
                add_group<Storage, 1, true>(&own, scale, a, token + m, g, out + m);
            }
        }
        for (int m = 0; m < M; ++m) x[m] += w.padded;
    }
}

// B blocks with M tokens; where the epilogue pairs blocks, the two of a pair. Not inlined: the registers of one M are
// not to be chosen with regard to the others'.
template <int Storage, bool Exact, int M, int B>
__attribute__((noinline)) void few_of_blocks(const Prepared& w, const Activations& a, const Output& out, int64_t block, int64_t token) {
    alignas(64) float products[B][M][kRows];
    Isa::Floats sums[B][M];
    // One token's sum is a chain of additions: two blocks at once hide its latency.
    if constexpr (Exact && M == 1) {
        blocks_exact<Storage, M, B>(w, a, block, token, sums);
    } else {
        for (int b = 0; b < B; ++b) {
            if constexpr (Exact) {
                blocks_exact<Storage, M, 1>(w, a, block + b, token, sums + b);
            } else {
                block_int8<Storage, M>(w, a, block + b, token, sums[b]);
            }
        }
    }
    for (int b = 0; b < B; ++b) {
        for (int m = 0; m < M; ++m) Isa::store_floats(products[b][m], sums[b][m]);
    }
    for (int m = 0; m < M; ++m) {
        if (out.epilogue != Epilogue::kStore) {
            finish(out, block, token + m, products[0][m], products[B - 1][m]);
        } else {
            for (int b = 0; b < B; ++b) finish(out, block + b, token + m, products[b][m], nullptr);
        }
    }
}

// Their codes stay in the cache while all tokens meet them, Isa::kMostFew at once: unpacking again is 1.5 to 2.1
// instructions a quad, where a token is one or two.
template <int Storage, bool Exact, int B>
void all_tokens(const Prepared& w, const Activations& a, const Output& out, const Tile& tile, int64_t block) {
    int64_t token = tile.token_begin;
    for (; Isa::kMostFew == 8 && token + 8 <= tile.token_end; token += 8) {
        few_of_blocks<Storage, Exact, Isa::kMostFew, B>(w, a, out, block, token);
    }
    for (; token + 4 <= tile.token_end; token += 4) few_of_blocks<Storage, Exact, 4, B>(w, a, out, block, token);
    switch (tile.token_end - token) {
        case 3: return few_of_blocks<Storage, Exact, 3, B>(w, a, out, block, token);
        case 2: return few_of_blocks<Storage, Exact, 2, B>(w, a, out, block, token);
        case 1: return few_of_blocks<Storage, Exact, 1, B>(w, a, out, block, token);
    }
}

template <int Storage, bool Exact>
void few_tokens(const Prepared& w, const Activations& a, const Output& out, const Tile& tile) {
    // A piece begins somewhere new: what the loop would only ask for block by block is asked for at once.
    const uint8_t *first = w.codes + tile.block_begin * w.block_bytes(), *end = w.codes + tile.block_end * w.block_bytes();
    for (const uint8_t* at = first; at < end && at < first + kPrefetch; at += 64) Isa::prefetch(at);
    int64_t block = tile.block_begin;
    for (; block + 2 <= tile.block_end; block += 2) all_tokens<Storage, Exact, 2>(w, a, out, tile, block);
    for (; block < tile.block_end; ++block) all_tokens<Storage, Exact, 1>(w, a, out, tile, block);
}

template <int Storage>
void unpack_block(const Prepared& w, int64_t block, uint8_t* to) {
    constexpr int kQuads = quads_per_unit(Storage);
    const uint8_t* codes = w.codes + block * w.block_bytes();
    for (int64_t u = w.columns() / (4 * kQuads); u > 0; --u, codes += unit_bytes(Storage)) {
        Isa::Quad quads[kQuads];
        Isa::template unpack<Storage>(codes, quads);
        look_up<Storage>(w, quads);
        for (int i = 0; i < kQuads; ++i, to += 64) Isa::store_quad(to, quads[i]);
    }
}

// M tokens x B blocks over unpacked quads [B][columns / 4][64], `bytes` from one block to the next. The rests are a second
// pass over a group's quads, which are in L1 by then: two sets of sums would not fit the registers.
template <int Storage, int M, int B>
DQ_INLINE void tile_int8(const Prepared& w, const Activations& a, int64_t block, int64_t token, const uint8_t* quads,
                         float (*products)[M][kRows]) {
    const int64_t bytes = w.columns() * kRows;
    Isa::Floats out[B][M];
    for (int b = 0; b < B; ++b) {
        for (int m = 0; m < M; ++m) out[b][m] = Isa::splat_float(0.0f);
    }
    for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* const group = quads + g * w.padded * kRows;
        const auto scale_at = [&](int b) { return ((block + b) * w.groups + g) * kRows; };
        const auto add_all = [&](const int8_t* x, const int32_t* sum, auto is_rest) {
            x += token * a.columns + g * w.padded;
            sum += token * a.groups + g;
            const uint8_t* from = group;
            Isa::Sums<Storage> sums[B][M];
            for (int b = 0; b < B; ++b) {
                for (int m = 0; m < M; ++m) Isa::start(sums[b][m], first_sum<Storage>(w, scale_at(b), sum[m * a.groups]));
            }
            for (int64_t left = w.padded / 4; left > 0; left -= 8) {
                const int64_t run = left < 8 ? left : 8;
                for (int64_t i = 0; i < run; ++i, from += 64, x += 4) {
                    Isa::Quad q[B];
                    for (int b = 0; b < B; ++b) q[b] = Isa::load_quad(from + b * bytes);
                    for (int m = 0; m < M; ++m) {
                        for (int b = 0; b < B; ++b) Isa::dot(sums[b][m], q[b], x + m * a.columns);
                    }
                }
                for (int b = 0; b < B; ++b) {
                    for (int m = 0; m < M; ++m) Isa::flush(sums[b][m]);
                }
            }
            for (int b = 0; b < B; ++b) {
                const Isa::Floats scale = group_scale<Storage>(w, scale_at(b));
                add_group<Storage, M, decltype(is_rest)::value>(sums[b], scale, a, token, g, out[b]);
            }
        };
        add_all(a.q, a.sum, std::false_type{});
        if (count_of<M>(a, token, g, kFine)) {
            add_all(a.rest, a.rest_sum, std::true_type{});
            continue;
        }
        for (int m = 0; m < M; ++m) {
            const int64_t at = (token + m) * a.groups + g;
            if (a.kind[at] == kCoarse) continue;
            for (int b = 0; b < B; ++b) {
                const auto unpacked = [&](int64_t unit, Isa::Quad* to) {
                    constexpr int kQuads = quads_per_unit(Storage);
                    for (int i = 0; i < kQuads; ++i) to[i] = Isa::load_quad(group + b * bytes + (unit * kQuads + i) * 64);
                };
                Isa::Sums<Storage> own;
                Isa::start(own, first_sum<Storage>(w, scale_at(b), a.rest_sum[at]));
                add_touched<Storage>(w, a.touched[at], a.rest + (token + m) * a.columns + g * w.padded, unpacked, own);
                add_group<Storage, 1, true>(&own, group_scale<Storage>(w, scale_at(b)), a, token + m, g, &out[b][m]);
            }
        }
    }
    for (int b = 0; b < B; ++b) {
        for (int m = 0; m < M; ++m) Isa::store_floats(products[b][m], out[b][m]);
    }
}

template <int Storage, bool Exact, int M, int B>
void tile_of(const Prepared& w, const Activations& a, const Output& out, int64_t block, int64_t token,
             const void* scratch) {
    alignas(64) float products[B][M][kRows];
    if constexpr (Exact) {
        tile_exact<Storage, M, B>(w, a, block, token, static_cast<const float*>(scratch), products);
    } else {
        tile_int8<Storage, M, B>(w, a, block, token, static_cast<const uint8_t*>(scratch), products);
    }
    const bool paired = out.epilogue != Epilogue::kStore;
    for (int m = 0; m < M; ++m) {
        if (paired) {
            finish(out, block, token + m, products[0][m], products[B - 1][m]);
        } else {
            for (int b = 0; b < B; ++b) finish(out, block + b, token + m, products[b][m], nullptr);
        }
    }
}

template <int Storage, bool Exact, int B>
void tiles_of_blocks(const Prepared& w, const Activations& a, const Output& out, const Tile& tile, int64_t block) {
    for (int b = 0; b < B; ++b) {
        if constexpr (Exact) {
            decode_block<Storage>(w, block + b, static_cast<float*>(tile.scratch) + b * w.columns() * kRows);
        } else {
            unpack_block<Storage>(w, block + b, static_cast<uint8_t*>(tile.scratch) + b * w.columns() * kRows);
        }
    }
    int64_t token = tile.token_begin;
    for (; token + Isa::kTokens <= tile.token_end; token += Isa::kTokens) {
        tile_of<Storage, Exact, Isa::kTokens, B>(w, a, out, block, token, tile.scratch);
    }
    for (; token + 2 <= tile.token_end; token += 2) tile_of<Storage, Exact, 2, B>(w, a, out, block, token, tile.scratch);
    for (; token < tile.token_end; ++token) tile_of<Storage, Exact, 1, B>(w, a, out, block, token, tile.scratch);
}

template <int Storage, bool Exact>
void matmul_of(const Prepared& w, const Activations& a, const Output& out, const Tile& tile) {
    if (tile.token_end - tile.token_begin <= kFewTokens) return few_tokens<Storage, Exact>(w, a, out, tile);
    int64_t block = tile.block_begin;
    for (; block + 2 <= tile.block_end; block += 2) tiles_of_blocks<Storage, Exact, 2>(w, a, out, tile, block);
    for (; block < tile.block_end; ++block) tiles_of_blocks<Storage, Exact, 1>(w, a, out, tile, block);
}

void matmul_int8(const Prepared& w, const Activations& a, const Output& out, const Tile& tile) {
    switch (w.storage) {
        case 2: return matmul_of<2, false>(w, a, out, tile);
        case 3: return matmul_of<3, false>(w, a, out, tile);
        case 4: return matmul_of<4, false>(w, a, out, tile);
        case kTable: return matmul_of<kTable, false>(w, a, out, tile);
        case 6: return matmul_of<6, false>(w, a, out, tile);
        default: return matmul_of<8, false>(w, a, out, tile);
    }
}

void matmul_exact(const Prepared& w, const Activations& a, const Output& out, const Tile& tile) {
    switch (w.storage) {
        case 2: return matmul_of<2, true>(w, a, out, tile);
        case 3: return matmul_of<3, true>(w, a, out, tile);
        case 4: return matmul_of<4, true>(w, a, out, tile);
        case kTable: return matmul_of<kTable, true>(w, a, out, tile);
        case 6: return matmul_of<6, true>(w, a, out, tile);
        case 8: return matmul_of<8, true>(w, a, out, tile);
        default: return matmul_of<kFloat, true>(w, a, out, tile);
    }
}

}  // namespace
}  // namespace dq

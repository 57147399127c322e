// The matmuls, written once over the primitives of an `Isa` (isa_*.h). Included by one file per instruction set.
//
// Few tokens: a block of 16 rows is unpacked in registers and met by several tokens at once; the weights stream from
// memory once, and that stream is what a decode step costs. Many tokens: two blocks are unpacked into scratch (L1 or L2), and
// tiles of 6 tokens x 32 rows run over it.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "matmul_exact_impl.h"
#include "matmul_parts.h"
#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {

template <int Storage>
DQ_INLINE Isa::Ints first_sum(const Prepared& w, int64_t scale_at, int32_t sum) {
    return w.zero ? Isa::zero_times(w.zero + scale_at, -sum) : Isa::splat_int(-w.middle * sum);
}

// out[m] += sums[m] * scale of the weight * scale of the activation * factor
template <int Storage, int M>
DQ_INLINE void add_group(const Isa::Sums<Storage>* sums, Isa::Floats scale, const Activations& a, int64_t token, int64_t g,
                         float factor, Isa::Floats* out) {
    for (int m = 0; m < M; ++m) {
        const Isa::Floats both = Isa::mul(scale, Isa::splat_float(a.scale[a.at(token + m, g)] * factor));
        out[m] = Isa::mul_add(Isa::to_float(sums[m]), both, out[m]);
    }
}

// Where any of M tokens has outliers in a group.
template <int M>
DQ_INLINE uint32_t touched_by(const Activations& a, int64_t token, int64_t g) {
    uint32_t touched = 0;
    for (int m = 0; m < M; ++m) touched |= a.touched[a.at(token + m, g)];
    return touched;
}

// One group of one block with M tokens, codes unpacked in registers: adds the sums of q, and of fine tokens those of the rest.
template <int Storage, int M, bool Fine>
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
                if (Fine) Isa::dot(rest[m], quads[i], x[m] + to_rest + at);
            }
        }
    };
    const auto flush = [&] {
        for (int m = 0; m < M; ++m) Isa::flush(sums[m]);
        for (int m = 0; Fine && m < M; ++m) Isa::flush(rest[m]);
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

// Adds the products of the outliers of M tokens in a group: of the units that hold a quad which `touched` names.
template <int Storage, int M>
DQ_INLINE void outliers_int8(const Prepared& w, const uint8_t* codes, uint32_t touched, const int8_t* const* x, int64_t to_rest,
                             Isa::Sums<Storage>* sums) {
    constexpr int kQuads = quads_per_unit(Storage);
    const int64_t quads = w.padded / 4, per_bit = quads_per_bit(w);
    int64_t unit = 0;
    for (; touched != 0; touched &= touched - 1) {
        const int64_t first = __builtin_ctz(touched) * per_bit;
        const int64_t last = (first + per_bit < quads ? first + per_bit : quads) - 1;
        if (unit < first / kQuads) unit = first / kQuads;
        for (; unit <= last / kQuads; ++unit) {
            Isa::Quad q[kQuads];
            Isa::template unpack<Storage>(codes + unit * unit_bytes(Storage), q);
            look_up<Storage>(w, q);
            for (int i = 0; i < kQuads; ++i) {
                for (int m = 0; m < M; ++m) Isa::dot(sums[m], q[i], x[m] + to_rest + 4 * (unit * kQuads + i));
            }
            for (int m = 0; m < M; ++m) Isa::flush(sums[m]);
        }
    }
}

// Products of one block with M tokens, which are fine or are not.
template <int Storage, int M, bool Fine>
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
        const Isa::Floats scale = group_scale<Storage>(w, scale_at);
        const auto first = [&](const int32_t* sum, int m) {
            return first_sum<Storage>(w, scale_at, sum[a.at(token + m, g)]);
        };
        Isa::Sums<Storage> sums[M], rest[M];
        const uint32_t touched = Fine ? 0 : touched_by<M>(a, token, g);
        if (touched != 0) {
            for (int m = 0; m < M; ++m) Isa::start(sums[m], Isa::splat_int(0));
            outliers_int8<Storage, M>(w, codes, touched, x, to_rest, sums);
            for (int m = 0; m < M; ++m) Isa::scale_up(sums[m], kOutlierUnit, first(a.sum, m));
        } else {
            for (int m = 0; m < M; ++m) Isa::start(sums[m], first(a.sum, m));
        }
        for (int m = 0; Fine && m < M; ++m) Isa::start(rest[m], first(a.rest_sum, m));
        codes = group_int8<Storage, M, Fine>(w, codes, x, to_rest, sums, rest);
        add_group<Storage, M>(sums, scale, a, token, g, 1.0f, out);
        if (Fine) add_group<Storage, M>(rest, scale, a, token, g, 1.0f / 256.0f, out);
        for (int m = 0; m < M; ++m) x[m] += w.padded;
    }
}

// Calls work(begin, end, fine) for every run of tokens that are all fine, or all not.
template <bool Exact, class Work>
void every_run(const Activations& a, const Tile& tile, const Work& work) {
    if constexpr (Exact) return work(tile.token_begin, tile.token_end, std::false_type{});
    for (int64_t begin = tile.token_begin, end = begin; begin < tile.token_end; begin = end) {
        while (end < tile.token_end && a.held[end] == a.held[begin]) ++end;
        if (a.held[begin] == Held::kFifteenBits) {
            work(begin, end, std::true_type{});
        } else {
            work(begin, end, std::false_type{});
        }
    }
}

// B blocks with M tokens; where the epilogue pairs blocks, the two of a pair. Not inlined: the registers of one M are
// not to be chosen with regard to the others'.
template <int Storage, bool Exact, bool Fine, int M, int B>
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
                block_int8<Storage, M, Fine>(w, a, block + b, token, sums[b]);
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
    every_run<Exact>(a, tile, [&](int64_t token, int64_t end, auto is_fine) {
        constexpr bool kFine = decltype(is_fine)::value;
        for (; Isa::kMostFew == 8 && token + 8 <= end; token += 8) {
            few_of_blocks<Storage, Exact, kFine, Isa::kMostFew, B>(w, a, out, block, token);
        }
        for (; token + 4 <= end; token += 4) few_of_blocks<Storage, Exact, kFine, 4, B>(w, a, out, block, token);
        switch (end - token) {
            case 3: return few_of_blocks<Storage, Exact, kFine, 3, B>(w, a, out, block, token);
            case 2: return few_of_blocks<Storage, Exact, kFine, 2, B>(w, a, out, block, token);
            case 1: return few_of_blocks<Storage, Exact, kFine, 1, B>(w, a, out, block, token);
        }
    });
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

// M tokens x B blocks over unpacked quads [B][columns / 4][64], `bytes` from one block to the next. The rests of fine tokens
// are a second pass over a group's quads, which are in L1 by then: two sets of sums would not fit the registers. Outliers
// come first, into the same sums: in a tile of SmolLM2's activations they touch 5 of 16 quads, in a single token 1.6, and
// going through each token's own took as long as all the rest of the tile.
template <int Storage, int M, int B, bool Fine>
DQ_INLINE void tile_int8(const Prepared& w, const Activations& a, int64_t block, int64_t token, const uint8_t* quads,
                         float (*products)[M][kRows]) {
    const int64_t bytes = w.columns() * kRows, in_group = w.padded / 4, per_bit = quads_per_bit(w);
    Isa::Floats out[B][M];
    for (int b = 0; b < B; ++b) {
        for (int m = 0; m < M; ++m) out[b][m] = Isa::splat_float(0.0f);
    }
    for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* const group = quads + g * w.padded * kRows;
        const int64_t x_at = token * a.columns + g * w.padded, sum_at = a.at(token, g);
        Isa::Sums<Storage> sums[B][M];
        const auto add_quad = [&](int64_t quad, const int8_t* x) {
            Isa::Quad q[B];
            for (int b = 0; b < B; ++b) q[b] = Isa::load_quad(group + quad * 64 + b * bytes);
            for (int m = 0; m < M; ++m) {
                for (int b = 0; b < B; ++b) Isa::dot(sums[b][m], q[b], x + m * a.columns + 4 * quad);
            }
        };
        const auto every_sum = [&](auto work) {
            for (int b = 0; b < B; ++b) {
                for (int m = 0; m < M; ++m) work(sums[b][m], b, m);
            }
        };
        const auto flush = [](Isa::Sums<Storage>& s, int, int) { Isa::flush(s); };
        const auto add_all = [&](const int8_t* x) {
            for (int64_t quad = 0; quad < in_group;) {
                for (const int64_t end = quad + 8 < in_group ? quad + 8 : in_group; quad < end; ++quad) add_quad(quad, x);
                every_sum(flush);
            }
        };
        const auto scale_at = [&](int b) { return ((block + b) * w.groups + g) * kRows; };
        const auto first = [&](const int32_t* sum, int b, int m) {
            return first_sum<Storage>(w, scale_at(b), sum[sum_at + m * a.groups]);
        };
        const auto add_products = [&](float factor) {
            for (int b = 0; b < B; ++b) {
                add_group<Storage, M>(sums[b], group_scale<Storage>(w, scale_at(b)), a, token, g, factor, out[b]);
            }
        };
        uint32_t touched = Fine ? 0 : touched_by<M>(a, token, g);
        if (touched == 0) {
            every_sum([&](auto& s, int b, int m) { Isa::start(s, first(a.sum, b, m)); });
        } else {
            every_sum([&](auto& s, int, int) { Isa::start(s, Isa::splat_int(0)); });
            for (; touched != 0; touched &= touched - 1) {
                const int64_t quad = __builtin_ctz(touched) * per_bit;
                for (int64_t i = quad; i < quad + per_bit && i < in_group; ++i) {
                    add_quad(i, a.rest + x_at);
                    every_sum(flush);
                }
            }
            every_sum([&](auto& s, int b, int m) { Isa::scale_up(s, kOutlierUnit, first(a.sum, b, m)); });
        }
        add_all(a.q + x_at);
        add_products(1.0f);
        if (Fine) {
            every_sum([&](auto& s, int b, int m) { Isa::start(s, first(a.rest_sum, b, m)); });
            add_all(a.rest + x_at);
            add_products(1.0f / 256.0f);
        }
    }
    for (int b = 0; b < B; ++b) {
        for (int m = 0; m < M; ++m) Isa::store_floats(products[b][m], out[b][m]);
    }
}

template <int Storage, bool Exact, bool Fine, int M, int B>
void tile_of(const Prepared& w, const Activations& a, const Output& out, int64_t block, int64_t token,
             const void* scratch) {
    alignas(64) float products[B][M][kRows];
    if constexpr (Exact) {
        tile_exact<Storage, M, B>(w, a, block, token, static_cast<const float*>(scratch), products);
    } else {
        tile_int8<Storage, M, B, Fine>(w, a, block, token, static_cast<const uint8_t*>(scratch), products);
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
    every_run<Exact>(a, tile, [&](int64_t token, int64_t end, auto is_fine) {
        constexpr bool kFine = decltype(is_fine)::value;
        for (; token + Isa::kTokens <= end; token += Isa::kTokens) {
            tile_of<Storage, Exact, kFine, Isa::kTokens, B>(w, a, out, block, token, tile.scratch);
        }
        for (; token + 2 <= end; token += 2) tile_of<Storage, Exact, kFine, 2, B>(w, a, out, block, token, tile.scratch);
        for (; token < end; ++token) tile_of<Storage, Exact, kFine, 1, B>(w, a, out, block, token, tile.scratch);
    });
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

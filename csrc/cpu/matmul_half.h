// Matmuls of prompts in AMX tiles of bfloat16: two blocks of weights are decoded once, scales and all, and meet 32 tokens at
// a time, and the sums stay in their tiles from the first column to the last. With integers every group of every tile has
// to be stored, scaled and added, which took four times as long as the products, and outliers apart.
//
// A weight and an activation lose up to 2^-8 of themselves: SmolLM2-135M at 4 bits has a KL of 4.5e-4 to exact activations
// so, 7.8e-4 with 8-bit ones. An element is the sum of its products in the order of columns, however many tokens there are.
#pragma once

#include <algorithm>
#include <cstring>

#include "isa_avx512.h"
#include "matmul_exact_impl.h"
#include "matmul_parts.h"
#include "tiles.h"

namespace dq {
namespace {

// Column j and j + 1 of 16 rows, a pair a lane.
DQ_INLINE __m512i half_pairs(__m512 first, __m512 second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// One block as tiles want it, [columns / 2][16 rows][2], zeros behind the last column.
template <int Storage>
__attribute__((noinline)) void decode_half(const Prepared& w, int64_t block, uint16_t* to) {
    constexpr int kQuads = quads_per_unit(Storage);
    const uint8_t* codes = w.codes + block * w.block_bytes();
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t scale_at = (block * w.groups + g) * kRows;
        const Isa::Floats scale = Isa::load16(w.scale + scale_at, w.is_bf16);
        const Isa::Ints zero = w.zero ? Isa::load_zero(w.zero + scale_at) : Isa::splat_int(w.middle);
        for (int64_t u = w.padded / (4 * kQuads); u > 0; --u, codes += unit_bytes(Storage)) {
            Isa::Quad quads[kQuads];
            Isa::template unpack<Storage>(codes, quads);
            for (int i = 0; i < kQuads; ++i, to += 4 * kRows) {
                const Isa::Floats first = Isa::mul(count_of<Storage, 0>(w, quads[i], zero), scale);
                const Isa::Floats second = Isa::mul(count_of<Storage, 1>(w, quads[i], zero), scale);
                const Isa::Floats third = Isa::mul(count_of<Storage, 2>(w, quads[i], zero), scale);
                const Isa::Floats fourth = Isa::mul(count_of<Storage, 3>(w, quads[i], zero), scale);
                _mm512_store_si512(to, half_pairs(first, second));
                _mm512_store_si512(to + 2 * kRows, half_pairs(third, fourth));
            }
        }
    }
    const int64_t behind = half_columns_of(w.columns()) - w.columns();
    std::memset(to, 0, static_cast<size_t>(behind * kRows) * sizeof *to);
}

// Products of B decoded blocks with T tiles of tokens from `token` on, [B][16 T][rows].
template <int B, int T>
DQ_INLINE void half_products(const Activations& a, int64_t token, const uint16_t* weights, float (*to)[2 * kHalfTokens][kRows]) {
    static_assert(kHalfTokens == kTileRows);
    const int64_t columns = a.half_columns();
    zero_tile<0>();
    if (T == 2) zero_tile<1>();
    if (B == 2) zero_tile<2>();
    if (B == 2 && T == 2) zero_tile<3>();
    const uint16_t* inputs = a.half + token * columns;
    for (int64_t c = 0; c < columns; c += kHalfColumns, inputs += kHalfColumns, weights += kHalfColumns * kRows) {
        load_tile<4>(inputs, 2 * columns);
        load_tile<6>(weights, kTileBytes);
        multiply_halves<0, 4, 6>();
        if (T == 2) load_tile<5>(inputs + kHalfTokens * columns, 2 * columns);
        if (T == 2) multiply_halves<1, 5, 6>();
        if (B == 1) continue;
        load_tile<7>(weights + kRows * columns, kTileBytes);
        multiply_halves<2, 4, 7>();
        if (T == 2) multiply_halves<3, 5, 7>();
    }
    store_tile<0>(to[0]);
    if (T == 2) store_tile<1>(to[0] + kHalfTokens);
    if (B == 2) store_tile<2>(to[1]);
    if (B == 2 && T == 2) store_tile<3>(to[1] + kHalfTokens);
}

template <int B>
__attribute__((noinline)) void tokens_in_half(const Activations& a, const Output& out, const Tile& tile, int64_t block) {
    const auto* weights = static_cast<const uint16_t*>(tile.scratch);
    alignas(64) float found[2][2 * kHalfTokens][kRows];
    for (int64_t token = tile.token_begin; token < tile.token_end; token += 2 * kHalfTokens) {
        const int64_t count = std::min<int64_t>(2 * kHalfTokens, tile.token_end - token);
        if (count > kHalfTokens) {
            half_products<B, 2>(a, token, weights, found);
        } else {
            half_products<B, 1>(a, token, weights, found);
        }
        for (int64_t m = 0; m < count; ++m) {
            if (out.epilogue != Epilogue::kStore) {
                finish(out, block, token + m, found[0][m], found[B - 1][m]);
            } else {
                for (int b = 0; b < B; ++b) finish(out, block + b, token + m, found[b][m], nullptr);
            }
        }
    }
}

template <int Storage>
void run_in_half(const Prepared& w, const Activations& a, const Output& out, const Tile& tile) {
    auto* weights = static_cast<uint16_t*>(tile.scratch);
    shape_tiles(kTileRows, kTileRows);
    for (int64_t block = tile.block_begin; block < tile.block_end; block += 2) {
        decode_half<Storage>(w, block, weights);
        if (block + 1 == tile.block_end) {
            tokens_in_half<1>(a, out, tile, block);
        } else {
            decode_half<Storage>(w, block + 1, weights + kRows * a.half_columns());
            tokens_in_half<2>(a, out, tile, block);
        }
    }
    release_tiles();
}

// Kernels::round.
void round_to_half(const Prepared& w, const float* x, int64_t stride, const Activations& a, int64_t begin, int64_t end) {
    const int64_t columns = a.half_columns();
    for (int64_t token = begin; token < end; ++token) {
        a.held[token] = Held::kBfloat16;
        uint16_t* to = a.half + token * columns;
        std::memset(to + a.columns, 0, static_cast<size_t>(columns - a.columns) * sizeof *to);
        for (int64_t g = 0; g < w.groups; ++g, to += w.padded) {
            const float* from = x + token * stride + g * w.group;
            for (int64_t i = 0; i < w.padded; i += 16) {
                const auto lanes = [](int64_t count) {
                    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << std::max<int64_t>(count, 0)) - 1);
                };
                const __m512 v = _mm512_maskz_loadu_ps(lanes(w.group - i), from + i);
                _mm256_mask_storeu_epi16(to + i, lanes(w.padded - i), (__m256i)_mm512_cvtneps_pbh(v));
            }
        }
    }
}

}  // namespace
}  // namespace dq

// Integer matmuls of five tokens and more in AMX tiles: the sums of a group, of 16 tokens x 16 rows, are one product of tiles
// for every 64 columns. A quad of 16 rows x 4 columns is a row of a tile as it lies, so weights only have to be unpacked and
// made signed; the sums then need no correction for zero points. They are the same integers as everywhere else and are
// scaled in the same order: results equal AVX-512's bit for bit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "isa_avx512.h"
#include "matmul_half.h"
#include "matmul_parts.h"
#include "tiles.h"

namespace dq {
namespace {

// Below, a tile has too few rows to pay for storing and reading back its sums.
constexpr int64_t kFewestInTiles = 5;

// Codes of 8 bits are tiles as they are stored; unsigned, so that sums need the zero point's share taken off after all.
template <int Storage>
constexpr bool kAsStored = Storage == 8;

// Quads of a tile of weights: the most that divide a group into whole units; 0 where they are too few, or where codes minus
// zero points do not fit 8 bits.
template <int Storage>
int quads_of_tile(const Prepared& w) {
    if (Storage == 8 && w.zero) return 0;
    const int64_t in_group = w.padded / 4;
    for (int quads = kTileRows; quads >= 8; --quads) {
        if (quads % quads_per_unit(Storage) == 0 && in_group % quads == 0) return quads;
    }
    return 0;
}

// What to take off the codes of a group of a block: its 16 zero points, each for four columns.
template <int Storage>
DQ_INLINE Isa::Quad zero_quad(const Prepared& w, int64_t scale_at) {
    if (!w.zero) return _mm512_set1_epi8(static_cast<char>(w.middle));
    const __m128i each = _mm_set_epi8(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0);
    return _mm512_shuffle_epi8(Isa::load_zero(w.zero + scale_at), _mm512_broadcast_i32x4(each));
}

// `quads` quads of codes as signed values.
template <int Storage>
DQ_INLINE void unpack_signed(const Prepared& w, const uint8_t* codes, int64_t quads, Isa::Quad zero, uint8_t* to) {
    constexpr int kQuads = quads_per_unit(Storage);
    for (int64_t at = 0; at < quads; at += kQuads, codes += unit_bytes(Storage)) {
        Isa::Quad q[kQuads];
        Isa::template unpack<Storage>(codes, q);
        look_up<Storage>(w, q);
        for (int i = 0; i < kQuads; ++i, to += kTileBytes) Isa::store_quad(to, _mm512_sub_epi8(q[i], zero));
    }
}

// Weights of one block after the other, as they come: for one tile of tokens. The buffers take turns, so that the next tile
// is being written while the last is read.
template <int Storage>
class Streamed {
public:
    Streamed(const Prepared& w, int quads) : w_(w), quads_(quads) {}

    DQ_INLINE const uint8_t* tile(int64_t block, int64_t group, int64_t column) {
        const int64_t at = column / 4 / quads_per_unit(Storage) * unit_bytes(Storage);
        const uint8_t* codes = w_.codes + block * w_.block_bytes() + group * w_.group_bytes() + at;
        for (int line = 0; line < quads_ / quads_per_unit(Storage) * unit_bytes(Storage); line += 64) {
            Isa::prefetch(codes + kPrefetch + line);
        }
        if constexpr (kAsStored<Storage>) return codes;
        uint8_t* const to = buffer_[next_++ % kBuffers];
        unpack_signed<Storage>(w_, codes, quads_, zero_quad<Storage>(w_, (block * w_.groups + group) * kRows), to);
        return to;
    }

private:
    static constexpr unsigned kBuffers = 4;
    const Prepared& w_;
    int quads_;
    unsigned next_ = 0;
    alignas(64) uint8_t buffer_[kBuffers][kTileRows * kTileBytes];
};

// A block or two that were unpacked as a whole, for many tiles of tokens.
template <int Storage>
class Unpacked {
public:
    Unpacked(const Prepared& w, int64_t first, int64_t end, uint8_t* scratch) : w_(w), first_(first), scratch_(scratch) {
        for (int64_t block = first; block < end && !kAsStored<Storage>; ++block) {
            for (int64_t g = 0; g < w.groups; ++g) {
                const uint8_t* codes = w.codes + block * w.block_bytes() + g * w.group_bytes();
                const Isa::Quad zero = zero_quad<Storage>(w, (block * w.groups + g) * kRows);
                unpack_signed<Storage>(w, codes, w.padded / 4, zero, const_cast<uint8_t*>(tile(block, g, 0)));
            }
        }
    }

    DQ_INLINE const uint8_t* tile(int64_t block, int64_t group, int64_t column) const {
        if constexpr (kAsStored<Storage>) return w_.codes + block * w_.block_bytes() + (group * w_.padded + column) * kRows;
        return scratch_ + ((block - first_) * w_.columns() + group * w_.padded + column) * kRows;
    }

private:
    const Prepared& w_;
    int64_t first_;
    uint8_t* scratch_;
};

// The sums of a group as they come out of the tiles, of one block or two. Rows of tokens that there are not keep what was
// there before, times a scale of 0.
struct alignas(64) TileSums {
    int32_t q[2][kTileRows][kRows], rest[2][kTileRows][kRows];
    bool has_rest;
};

// The tile of the `count` tokens from `token` on.
template <int Storage, bool Fine, class Weights>
class TokenTile {
public:
    TokenTile(const Prepared& w, const Activations& a, int quads, int64_t token, int64_t count, Weights& weights,
              TileSums* sums)
        : w_(w), a_(a), quads_(quads), token_(token), lanes_(static_cast<__mmask16>((1 << count) - 1)), weights_(weights),
          sums_(sums) {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        of_token_ = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(a.groups)));
    }

    // Products with B blocks from `block` on, of M >= count tokens: those from `count` on are 0.
    template <int B, int M>
    DQ_INLINE void products(int64_t block, float (*to)[kTileRows][kRows]) {
        Isa::Floats out[B][M];
        for (int b = 0; b < B; ++b) {
            for (int m = 0; m < M; ++m) out[b][m] = Isa::splat_float(0.0f);
        }
        multiply<B>(block, 0, sums_[0]);
        for (int64_t g = 0; g < w_.groups; ++g) {  // the tiles are at the next group while this one's sums are scaled
            if (g + 1 < w_.groups) multiply<B>(block, g + 1, sums_[(g + 1) % 2]);
            const TileSums& sums = sums_[g % 2];
            if (!Fine && sums.has_rest) {
                add<B, M, true>(block, g, sums, out);
            } else {
                add<B, M, false>(block, g, sums, out);
            }
        }
        for (int b = 0; b < B; ++b) {
            for (int m = 0; m < M; ++m) Isa::store_floats(to[b][m], out[b][m]);
        }
    }

private:
    // What all tokens of the tile have for a group, a lane each.
    template <typename T>
    DQ_INLINE __m512i of_tokens(const T* values, int64_t g) const {
        return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes_, of_token_, values + a_.at(token_, g), 4);
    }

    DQ_INLINE __m512i share_of_zero(const int32_t* sums, int64_t g) const {
        return _mm512_mullo_epi32(of_tokens(sums, g), _mm512_set1_epi32(w_.middle));
    }

    template <int B>
    DQ_INLINE void multiply(int64_t block, int64_t g, TileSums& sums) {
        const __m512i touched = of_tokens(a_.touched, g);
        const bool rest = Fine || _mm512_test_epi32_mask(touched, touched) != 0;
        zero_tile<kSums>();
        if (B == 2) zero_tile<kSums + 1>();
        if (rest) zero_tile<kRestSums>();
        if (rest && B == 2) zero_tile<kRestSums + 1>();
        for (int64_t column = 0; column < w_.padded; column += 4 * quads_) {
            const int64_t at = token_ * a_.columns + g * w_.padded + column;
            load_tile<kInputs>(a_.q + at, a_.columns);
            if (rest) load_tile<kRestInputs>(a_.rest + at, a_.columns);
            load_tile<kWeights>(weights_.tile(block, g, column), kTileBytes);
            multiply_tiles<kSums, kInputs, kWeights, kAsStored<Storage>>();
            if (rest) multiply_tiles<kRestSums, kRestInputs, kWeights, kAsStored<Storage>>();
            if (B == 1) continue;
            load_tile<kWeights + 1>(weights_.tile(block + 1, g, column), kTileBytes);
            multiply_tiles<kSums + 1, kInputs, kWeights + 1, kAsStored<Storage>>();
            if (rest) multiply_tiles<kRestSums + 1, kRestInputs, kWeights + 1, kAsStored<Storage>>();
        }
        store_tile<kSums>(sums.q[0]);
        if (B == 2) store_tile<kSums + 1>(sums.q[1]);
        if (rest) store_tile<kRestSums>(sums.rest[0]);
        if (rest && B == 2) store_tile<kRestSums + 1>(sums.rest[1]);
        sums.has_rest = rest;
    }

    // out += sums * scale of the weight * scale of the activation, in the order of add_group of matmul_impl.h.
    template <int B, int M, bool Outliers>
    DQ_INLINE void add(int64_t block, int64_t g, const TileSums& sums, Isa::Floats (*out)[M]) {
        alignas(64) float scales[kTileRows];
        alignas(64) int32_t shares[kTileRows], rest_shares[kTileRows];  // of the zero point, where it is not taken off yet
        if (kAsStored<Storage>) _mm512_store_si512(shares, share_of_zero(a_.sum, g));
        if (kAsStored<Storage> && Fine) _mm512_store_si512(rest_shares, share_of_zero(a_.rest_sum, g));
        _mm512_store_si512(scales, of_tokens(a_.scale, g));
        for (int b = 0; b < B; ++b) {
            const Isa::Floats scale = group_scale<Storage>(w_, ((block + b) * w_.groups + g) * kRows);
            for (int m = 0; m < M; ++m) {
                const Isa::Floats both = Isa::mul(scale, Isa::splat_float(scales[m]));
                __m512i sum = _mm512_load_si512(sums.q[b][m]);
                if (Outliers) {
                    const __m512i rest = _mm512_load_si512(sums.rest[b][m]);
                    sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(rest, _mm512_set1_epi32(kOutlierUnit)));
                }
                if (kAsStored<Storage>) sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(shares[m]));
                out[b][m] = Isa::mul_add(_mm512_cvtepi32_ps(sum), both, out[b][m]);
                if (Fine) {
                    __m512i rest = _mm512_load_si512(sums.rest[b][m]);
                    if (kAsStored<Storage>) rest = _mm512_sub_epi32(rest, _mm512_set1_epi32(rest_shares[m]));
                    const Isa::Floats less = Isa::mul(both, Isa::splat_float(1.0f / 256.0f));
                    out[b][m] = Isa::mul_add(_mm512_cvtepi32_ps(rest), less, out[b][m]);
                }
            }
        }
    }

    const Prepared& w_;
    const Activations& a_;
    int quads_;
    int64_t token_;
    __mmask16 lanes_;
    __m512i of_token_;  // places of the tokens' values, from the first token's on
    Weights& weights_;
    TileSums* sums_;  // of two groups
};

// `count` tokens with B blocks (of a pair both).
template <int Storage, bool Fine, int B, class Weights>
__attribute__((noinline)) void blocks_in_tile(const Prepared& w, const Activations& a, const Output& out, int quads,
                                              int64_t block, int64_t token, int64_t count, Weights& weights, TileSums* sums) {
    TokenTile<Storage, Fine, Weights> tile(w, a, quads, token, count, weights, sums);
    alignas(64) float found[2][kTileRows][kRows];
    if (count <= 8) {
        tile.template products<B, 8>(block, found);
    } else {  // twice sixteen results would not leave a register
        for (int b = 0; b < B; ++b) tile.template products<1, kTileRows>(block + b, found + b);
    }
    for (int64_t m = 0; m < count; ++m) {
        if (out.epilogue != Epilogue::kStore) {
            finish(out, block, token + m, found[0][m], found[B - 1][m]);
        } else {
            for (int b = 0; b < B; ++b) finish(out, block + b, token + m, found[b][m], nullptr);
        }
    }
}

template <int Storage, bool Fine>
void few_in_tile(const Prepared& w, const Activations& a, const Output& out, const Tile& tile, int quads) {
    const int64_t count = tile.token_end - tile.token_begin;
    shape_tiles(static_cast<int>(count), quads);
    Streamed<Storage> weights(w, quads);
    TileSums sums[2];
    int64_t block = tile.block_begin;
    const auto take = [&](auto blocks) {
        blocks_in_tile<Storage, Fine, blocks()>(w, a, out, quads, block, tile.token_begin, count, weights, sums);
        block += blocks();
    };
    while (block + 2 <= tile.block_end) take(std::integral_constant<int, 2>{});
    if (block < tile.block_end) take(std::integral_constant<int, 1>{});
}

template <int Storage, bool Fine, int B>
void many_in_tiles(const Prepared& w, const Activations& a, const Output& out, const Tile& tile, int quads, int64_t block) {
    Unpacked<Storage> weights(w, block, block + B, static_cast<uint8_t*>(tile.scratch));
    TileSums sums[2];
    int64_t shaped = 0;
    for (int64_t token = tile.token_begin; token < tile.token_end; token += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, tile.token_end - token);
        if (count != shaped) shape_tiles(static_cast<int>(count), quads);
        shaped = count;
        blocks_in_tile<Storage, Fine, B>(w, a, out, quads, block, token, count, weights, sums);
    }
}

template <int Storage, bool Fine>
void run_in_tiles(const Prepared& w, const Activations& a, const Output& out, const Tile& tile, int quads) {
    if (tile.token_end - tile.token_begin <= kTileRows) {
        few_in_tile<Storage, Fine>(w, a, out, tile, quads);
    } else {
        int64_t block = tile.block_begin;
        for (; block + 2 <= tile.block_end; block += 2) many_in_tiles<Storage, Fine, 2>(w, a, out, tile, quads, block);
        if (block < tile.block_end) many_in_tiles<Storage, Fine, 1>(w, a, out, tile, quads, block);
    }
    release_tiles();
}

template <int Storage>
void matmul_of(const Prepared& w, const Activations& a, const Output& out, const Tile& tile) {
    const int quads = quads_of_tile<Storage>(w);
    for (int64_t begin = tile.token_begin, end = begin; begin < tile.token_end; begin = end) {
        while (end < tile.token_end && a.held[end] == a.held[begin]) ++end;
        const Tile run{begin, end, tile.block_begin, tile.block_end, tile.scratch};
        if (a.held[begin] == Held::kBfloat16) {
            run_in_half<Storage>(w, a, out, run);
        } else if (quads == 0 || end - begin < kFewestInTiles) {
            kAvx512Kernels.matmul_int8(w, a, out, run);
        } else if (a.held[begin] == Held::kFifteenBits) {
            run_in_tiles<Storage, true>(w, a, out, run, quads);
        } else {
            run_in_tiles<Storage, false>(w, a, out, run, quads);
        }
    }
}

void matmul_in_tiles(const Prepared& w, const Activations& a, const Output& out, const Tile& tile) {
    switch (w.storage) {
        case 2: return matmul_of<2>(w, a, out, tile);
        case 3: return matmul_of<3>(w, a, out, tile);
        case 4: return matmul_of<4>(w, a, out, tile);
        case kTable: return matmul_of<kTable>(w, a, out, tile);
        case 6: return matmul_of<6>(w, a, out, tile);
        default: return matmul_of<8>(w, a, out, tile);
    }
}

}  // namespace
}  // namespace dq

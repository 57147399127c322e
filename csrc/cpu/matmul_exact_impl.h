// The products of matmul_impl.h with float32 activations. A group's products are added column by column and their sum
// multiplied with the scale, for few tokens and for many: a token's result does not depend on how many others there are.
#pragma once

#include "kernels.h"
#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {

// out[m] += sums[m] * scale of the weight, where it has one.
template <int Storage, int M>
DQ_INLINE void add_scaled(const Prepared& w, int64_t block, int64_t g, const Isa::Floats* sums, Isa::Floats* out) {
    if constexpr (Storage == kFloat) {
        for (int m = 0; m < M; ++m) out[m] = Isa::add(out[m], sums[m]);
    } else {
        const Isa::Floats scale = Isa::load16(w.scale + (block * w.groups + g) * kRows, w.is_bf16);
        for (int m = 0; m < M; ++m) out[m] = Isa::mul_add(sums[m], scale, out[m]);
    }
}

// What column J of every row of a quad counts, without the scale.
template <int Storage, int J>
DQ_INLINE Isa::Floats count_of(const Prepared& w, const Isa::Quad& q, const Isa::Ints& zero) {
    if constexpr (Storage == kTable) return Isa::template level<J>(q, w.levels.values);
    else return Isa::template value<J>(q, zero);
}

// Products of B blocks with M tokens: a group's products are added column by column, then their sum times the
// scale, as tile_exact does it.
template <int Storage, int M, int B>
DQ_INLINE void blocks_exact(const Prepared& w, const Activations& a, int64_t block, int64_t token, Isa::Floats (*out)[M]) {
    const uint8_t* codes[B];
    for (int b = 0; b < B; ++b) {
        codes[b] = w.codes + (block + b) * w.block_bytes();
        for (int m = 0; m < M; ++m) out[b][m] = Isa::splat_float(0.0f);
    }
    const float* x[M];
    for (int m = 0; m < M; ++m) x[m] = a.x + (token + m) * a.columns;
    for (int64_t g = 0; g < w.groups; ++g) {
        Isa::Floats sums[B][M];
        for (int b = 0; b < B; ++b) {
            for (int m = 0; m < M; ++m) sums[b][m] = Isa::splat_float(0.0f);
        }
        const auto add = [&](int b, int64_t column, Isa::Floats value) {
            for (int m = 0; m < M; ++m) sums[b][m] = Isa::mul_add(value, Isa::splat_float(x[m][column]), sums[b][m]);
        };
        if constexpr (Storage == kFloat) {
            for (int64_t c = 0; c < w.padded; ++c) {
                for (int b = 0; b < B; ++b) {
                    add(b, c, Isa::load16(reinterpret_cast<const uint16_t*>(codes[b]) + c * kRows, w.is_bf16));
                }
            }
            for (int b = 0; b < B; ++b) codes[b] += w.group_bytes();
            for (int m = 0; m < M; ++m) x[m] += w.padded;
        } else {
            constexpr int kQuads = quads_per_unit(Storage);
            Isa::Ints zero[B];
            for (int b = 0; b < B; ++b) {
                const uint8_t* from = w.zero + ((block + b) * w.groups + g) * kRows;
                zero[b] = w.zero ? Isa::load_zero(from) : Isa::splat_int(w.middle);
            }
            for (int64_t u = w.padded / (4 * kQuads); u > 0; --u) {
                Isa::Quad quads[B][kQuads];
                for (int b = 0; b < B; ++b) {
                    Isa::template unpack<Storage>(codes[b], quads[b]);
                    codes[b] += unit_bytes(Storage);
                }
                for (int i = 0; i < kQuads; ++i) {
                    for (int b = 0; b < B; ++b) {
                        const Isa::Quad& q = quads[b][i];
                        add(b, 4 * i, count_of<Storage, 0>(w, q, zero[b]));
                        add(b, 4 * i + 1, count_of<Storage, 1>(w, q, zero[b]));
                        add(b, 4 * i + 2, count_of<Storage, 2>(w, q, zero[b]));
                        add(b, 4 * i + 3, count_of<Storage, 3>(w, q, zero[b]));
                    }
                }
                for (int m = 0; m < M; ++m) x[m] += 4 * kQuads;
            }
        }
        for (int b = 0; b < B; ++b) add_scaled<Storage, M>(w, block + b, g, sums[b], out[b]);
    }
}

// Values of a block without their scale, [column][16 rows].
template <int Storage>
void decode_block(const Prepared& w, int64_t block, float* to) {
    const uint8_t* codes = w.codes + block * w.block_bytes();
    for (int64_t g = 0; g < w.groups; ++g) {
        if constexpr (Storage == kFloat) {
            const uint16_t* values = reinterpret_cast<const uint16_t*>(codes);
            for (int64_t c = 0; c < w.padded; ++c, to += kRows, values += kRows) {
                Isa::store_floats(to, Isa::load16(values, w.is_bf16));
            }
            codes += w.group_bytes();
        } else {
            constexpr int kQuads = quads_per_unit(Storage);
            const int64_t scale_at = (block * w.groups + g) * kRows;
            const Isa::Ints zero = w.zero ? Isa::load_zero(w.zero + scale_at) : Isa::splat_int(w.middle);
            for (int64_t u = w.padded / (4 * kQuads); u > 0; --u, codes += unit_bytes(Storage)) {
                Isa::Quad quads[kQuads];
                Isa::template unpack<Storage>(codes, quads);
                for (int i = 0; i < kQuads; ++i, to += 4 * kRows) {
                    Isa::store_floats(to, count_of<Storage, 0>(w, quads[i], zero));
                    Isa::store_floats(to + kRows, count_of<Storage, 1>(w, quads[i], zero));
                    Isa::store_floats(to + 2 * kRows, count_of<Storage, 2>(w, quads[i], zero));
                    Isa::store_floats(to + 3 * kRows, count_of<Storage, 3>(w, quads[i], zero));
                }
            }
        }
    }
}

template <int Storage, int M, int B>
DQ_INLINE void tile_exact(const Prepared& w, const Activations& a, int64_t block, int64_t token, const float* values,
                          float (*products)[M][kRows]) {
    const int64_t columns = w.columns();
    const float* x = a.x + token * a.columns;
    Isa::Floats out[B][M];
    for (int b = 0; b < B; ++b) {
        for (int m = 0; m < M; ++m) out[b][m] = Isa::splat_float(0.0f);
    }
    for (int64_t g = 0; g < w.groups; ++g, x += w.padded) {
        Isa::Floats sums[B][M];
        for (int b = 0; b < B; ++b) {
            for (int m = 0; m < M; ++m) sums[b][m] = Isa::splat_float(0.0f);
        }
        for (int64_t c = 0; c < w.padded; ++c, values += kRows) {
            Isa::Floats v[B];
            for (int b = 0; b < B; ++b) v[b] = Isa::load_floats(values + b * columns * kRows);
            for (int m = 0; m < M; ++m) {
                const Isa::Floats xc = Isa::splat_float(x[m * a.columns + c]);
                for (int b = 0; b < B; ++b) sums[b][m] = Isa::mul_add(v[b], xc, sums[b][m]);
            }
        }
        for (int b = 0; b < B; ++b) add_scaled<Storage, M>(w, block + b, g, sums[b], out[b]);
    }
    for (int b = 0; b < B; ++b) {
        for (int m = 0; m < M; ++m) Isa::store_floats(products[b][m], out[b][m]);
    }
}

}  // namespace
}  // namespace dq

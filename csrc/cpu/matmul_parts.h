// What every integer matmul shares: how far to prefetch, scales and levels, and what becomes of finished products.
#pragma once

#include "kernels.h"
#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {

// Bytes ahead in the codes, into the second-level cache: a Zen 4 core keeps far fewer lines in flight for its first. On a
// Sapphire Rapids 2048, 4096, 8192 and 32768 took 27.3, 27.5, 28.4 and 28.8 ms a token of a 1B model, 1024 took 30.1.
constexpr int kPrefetch = 4096;

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

}  // namespace
}  // namespace dq

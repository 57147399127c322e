// AMX's tile registers: eight of 16 rows x 64 bytes, and the product of two of them, 16384 multiplications in 16 cycles.
//
// Assembly instead of the compiler's intrinsics: those of GCC 12 and 13 do not say that a tile is loaded from memory, so that
// what was written there just before is dropped as dead. (llama.cpp 0.3.36, compiled by GCC 12 with -march=native, loads a
// configuration of which only the first byte was written, and dies of it.)
#pragma once

#include <cstdint>
#include <initializer_list>

#include "vec.h"

namespace dq {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64;
// Registers: sums and weights are of two blocks.
constexpr int kSums = 0, kRestSums = 2, kInputs = 4, kRestInputs = 5, kWeights = 6;

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles are sized for `tokens` rows of inputs [tokens, 4 quads] and weights [quads][16 rows x 4]. Until released, the
// operating system saves 8 KB more whenever it takes the core away.
DQ_INLINE void shape_tiles(int tokens, int quads) {
    TileShapes shapes;
    for (const int sums : {kSums, kSums + 1, kRestSums, kRestSums + 1}) {
        shapes.rows[sums] = static_cast<uint8_t>(tokens);
        shapes.bytes[sums] = kTileBytes;
    }
    for (const int inputs : {kInputs, kRestInputs}) {
        shapes.rows[inputs] = static_cast<uint8_t>(tokens);
        shapes.bytes[inputs] = static_cast<uint16_t>(4 * quads);
    }
    for (const int weights : {kWeights, kWeights + 1}) {
        shapes.rows[weights] = static_cast<uint8_t>(quads);
        shapes.bytes[weights] = kTileBytes;
    }
    asm volatile("ldtilecfg %0" : : "m"(shapes));
}
DQ_INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int T>
DQ_INLINE void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
DQ_INLINE void load_tile(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(T) : "memory");
}
template <int T>
DQ_INLINE void store_tile(void* rows) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(static_cast<int64_t>(kTileBytes)), "i"(T) : "memory");
}
// Sums [token][row] += signed inputs [token][column] x weights [quad][row][column of 4], signed or not.
template <int Sums, int Inputs, int Weights, bool Unsigned>
DQ_INLINE void multiply_tiles() {
    if constexpr (Unsigned) {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Inputs), "i"(Weights));
    } else {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Inputs), "i"(Weights));
    }
}
// Sums [token][row] += inputs [token][column] x weights [pair of columns][row][2], both bfloat16.
template <int Sums, int Inputs, int Weights>
DQ_INLINE void multiply_halves() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Inputs), "i"(Weights));
}

}  // namespace
}  // namespace dq

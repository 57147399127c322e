// From the canonical bitstream (layout.h), or from unquantized floats, to the kernels' order (prepared.h).
#pragma once

#include <cstdint>

#include "prepared.h"

namespace dq {

// What stores `bits`-bit codes in groups of `group` columns in the fewest bytes: 2, 3, 4, 6 or 8.
int storage_of(int bits, int64_t group);

// Where a linear's rows go: its i-th block of 16 rows becomes block `first + i * step` of the target.
struct Target {
    Prepared w;
    uint8_t* codes;
    uint16_t* scale;
    uint8_t* zero;
    int64_t first, step;
};

// Packed rows, canonical. `group_size` must be a multiple of the target's group, `bits` at most its storage; a target
// with zero points gets the middle code where the source has none.
struct PackedSource {
    const int32_t* packed;
    const uint16_t* scale;
    const uint8_t* zero;
    int64_t n;
    int bits;
    int64_t group_size;
};
void repack(const PackedSource& source, const Target& target, int threads);

enum class FloatType : int { kFloat32, kBfloat16, kFloat16 };

// Unquantized rows [n, k]. Into storage 8: symmetric, scale = the group's largest magnitude / 127 rounded up to
// bfloat16, so that no code leaves 1 .. 255. Into the two planes of a head, storage 6: the same with 125, so that no upper
// part leaves 1 .. 63. Into storage kFloat: the same 16 bits, reordered.
struct FloatSource {
    const void* values;
    FloatType type;
    int64_t n;
};
void repack(const FloatSource& source, const Target& target, int threads);

}  // namespace dq

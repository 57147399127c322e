// The CPU kernels without any instruction-set extension: the contract of every SIMD version.
#pragma once

#include <cstdint>

namespace dq {

// One linear's weight in memory. The value of a code is scale * (code - zero).
struct Weight {
    const int32_t* packed;   // [n, words_per_row(k, bits)], see layout.h
    const uint16_t* scale;   // [n, k / group_size], bfloat16 or float16 bits
    bool scale_is_bf16;      // else float16
    const uint8_t* zero;     // [n, k / group_size], or nullptr: every zero point is 2^(bits-1)
    int64_t n, k;            // out_features, in_features
    int bits;                // 2 .. 8
    int64_t group_size;      // divides k
    const float* levels;     // [16], bits == 4: the value is scale * levels[code] instead; or nullptr
};

namespace scalar {

// y[:, row_begin:row_end] of y = x @ decode(w).T, for x float32 [m, k] and y float32 [m, n], contiguous. An element
// of y depends on its row of x and its row of w only: not on m, nor on how rows are split over threads.
void qmm_rows(const Weight& w, const float* x, int64_t m, float* y, int64_t row_begin, int64_t row_end) noexcept;

// Values of rows row_begin .. row_end-1 into out float32 [row_end - row_begin, k]; exact (see qmm_scalar.cpp).
void dequantize_rows(const Weight& w, int64_t row_begin, int64_t row_end, float* out) noexcept;

// uint8 codes [n, k] <-> int32 words [n, words_per_row(k, bits)], rows row_begin .. row_end-1.
void pack_rows(const uint8_t* codes, int64_t k, int bits, int32_t* packed, int64_t row_begin,
               int64_t row_end) noexcept;
void unpack_rows(const int32_t* packed, int64_t k, int bits, uint8_t* codes, int64_t row_begin,
                 int64_t row_end) noexcept;

}  // namespace scalar
}  // namespace dq

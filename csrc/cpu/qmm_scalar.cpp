// Scalar qmm. Straight line per row of the weight: words -> codes (uint8) -> values (float32) -> one dot per row of x.
//
// Exactness. The zero point is subtracted from the integer code and the scale is multiplied in at once, rather than
// folding sum(code * x) - zero * sum(x): code - zero has at most 8 significant bits and a scale has 8 (bfloat16) or 11
// (float16), so scale * (code - zero) needs at most 19 of float32's 24 bits and is exact. The fold would subtract two
// sums that are each up to 2^(bits-1) times larger than their difference, which costs up to `bits` - 1 bits of result.
// What is left is the rounding of one product per weight and of the sum: 16 partial sums of K/16 terms and a tree of 4
// levels, so |error| <= (K/16 + 6) * 2^-24 * sum |x| |w|. -ffp-contract=off (setup.py) gives the same bits everywhere.

#include "qmm_scalar.h"

#include "../layout.h"

namespace dq::scalar {
namespace {

// Independent partial sums: without -ffast-math the compiler may vectorise across lanes only, never reorder one sum.
constexpr int kLanes = 16;
// Weights decoded at once: 2 KB of float32 stays in the smallest L1 next to the x it meets. A multiple of 8 and kLanes.
constexpr int64_t kChunk = 512;
// Rows of x that share one decode: their partial sums take 1 KB of stack.
constexpr int64_t kRowsOfX = 16;

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float float_of_half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 0x1F;
    const uint32_t mantissa = h & 0x3FF;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float32
        const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t wide = exponent == 31 ? 0xFF : exponent + 112;  // bias 15 -> 127; infinities and NaN stay
    return from_bits(sign | wide << 23 | mantissa << 13);
}

float scale_at(const Weight& w, int64_t i) {
    return w.scale_is_bf16 ? from_bits(static_cast<uint32_t>(w.scale[i]) << 16) : float_of_half(w.scale[i]);
}

// Values k0 .. k0+count-1 of a row; k0 is a multiple of 8, count <= kChunk.
template <int Bits>
void decode(const Weight& w, int64_t row, int64_t k0, int64_t count, float* __restrict out) {
    alignas(64) uint8_t codes[kChunk];
    const int64_t words = words_per_row(w.k, Bits);
    unpack_codes<Bits>(w.packed + row * words, words, k0, count, codes);

    int64_t group = row * (w.k / w.group_size) + k0 / w.group_size;
    int64_t end = (k0 / w.group_size + 1) * w.group_size - k0;  // of the group, counted from k0
    for (int64_t i = 0; i < count; ++group, end += w.group_size) {
        const float scale = scale_at(w, group);
        const int zero = w.zero ? w.zero[group] : 1 << (Bits - 1);
        const int64_t stop = end < count ? end : count;
        if (w.levels != nullptr) {
            for (; i < stop; ++i) out[i] = w.levels[codes[i] & 15] * scale;
            continue;
        }
        for (; i + 16 <= stop; i += 16) {  // groups are nearly always multiples of 16; a fixed count vectorises whole
            for (int j = 0; j < 16; ++j) out[i + j] = static_cast<float>(codes[i + j] - zero) * scale;
        }
        for (; i < stop; ++i) out[i] = static_cast<float>(codes[i] - zero) * scale;
    }
}

// sums[j] += w[i] * x[i] over i % kLanes == j. Two rows of x at once would share the load of w, but g++ 12 makes slower
// code of it: 550 us instead of 456 for M=2, N=1536, K=576.
void dot_add(const float* __restrict w, const float* __restrict x, int64_t count, float* __restrict sums) {
    float lane[kLanes];
    for (int j = 0; j < kLanes; ++j) lane[j] = sums[j];
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) lane[j] += w[i + j] * x[i + j];
    }
    for (int j = 0; j < kLanes; ++j) sums[j] = lane[j];
    for (; i < count; ++i) sums[i % kLanes] += w[i] * x[i];
}

float fold(float* sums) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    return sums[0];
}

template <int Bits>
void qmm(const Weight& w, const float* x, int64_t m, float* y, int64_t row_begin, int64_t row_end) {
    alignas(64) float values[kChunk];
    alignas(64) float sums[kRowsOfX][kLanes];
    for (int64_t row = row_begin; row < row_end; ++row) {
        for (int64_t m0 = 0; m0 < m; m0 += kRowsOfX) {
            const int64_t rows = m - m0 < kRowsOfX ? m - m0 : kRowsOfX;
            std::memset(sums, 0, static_cast<size_t>(rows) * sizeof(sums[0]));
            for (int64_t k0 = 0; k0 < w.k; k0 += kChunk) {
                const int64_t count = w.k - k0 < kChunk ? w.k - k0 : kChunk;
                decode<Bits>(w, row, k0, count, values);
                for (int64_t r = 0; r < rows; ++r) dot_add(values, x + (m0 + r) * w.k + k0, count, sums[r]);
            }
            for (int64_t r = 0; r < rows; ++r) y[(m0 + r) * w.n + row] = fold(sums[r]);
        }
    }
}

template <int Bits>
void dequantize(const Weight& w, int64_t row_begin, int64_t row_end, float* out) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        for (int64_t k0 = 0; k0 < w.k; k0 += kChunk) {
            const int64_t count = w.k - k0 < kChunk ? w.k - k0 : kChunk;
            decode<Bits>(w, row, k0, count, out + (row - row_begin) * w.k + k0);
        }
    }
}

template <int Bits>
void pack(const uint8_t* codes, int64_t k, int32_t* packed, int64_t row_begin, int64_t row_end) {
    const int64_t words = words_per_row(k, Bits);
    for (int64_t row = row_begin; row < row_end; ++row) pack_codes<Bits>(codes + row * k, k, packed + row * words);
}

template <int Bits>
void unpack(const int32_t* packed, int64_t k, uint8_t* codes, int64_t row_begin, int64_t row_end) {
    const int64_t words = words_per_row(k, Bits);
    for (int64_t row = row_begin; row < row_end; ++row) {
        unpack_codes<Bits>(packed + row * words, words, 0, k, codes + row * k);
    }
}

}  // namespace

// One instance per bit width, so that every shift and mask is a constant.
#define DQ_FOR_BITS(bits, call) \
    switch (bits) {             \
        case 2: call(2); break; \
        case 3: call(3); break; \
        case 4: call(4); break; \
        case 5: call(5); break; \
        case 6: call(6); break; \
        case 7: call(7); break; \
        case 8: call(8); break; \
        default: break;         \
    }

void qmm_rows(const Weight& w, const float* x, int64_t m, float* y, int64_t row_begin, int64_t row_end) noexcept {
#define DQ_CALL(B) qmm<B>(w, x, m, y, row_begin, row_end)
    DQ_FOR_BITS(w.bits, DQ_CALL)
#undef DQ_CALL
}

void dequantize_rows(const Weight& w, int64_t row_begin, int64_t row_end, float* out) noexcept {
#define DQ_CALL(B) dequantize<B>(w, row_begin, row_end, out)
    DQ_FOR_BITS(w.bits, DQ_CALL)
#undef DQ_CALL
}

void pack_rows(const uint8_t* codes, int64_t k, int bits, int32_t* packed, int64_t row_begin,
               int64_t row_end) noexcept {
#define DQ_CALL(B) pack<B>(codes, k, packed, row_begin, row_end)
    DQ_FOR_BITS(bits, DQ_CALL)
#undef DQ_CALL
}

void unpack_rows(const int32_t* packed, int64_t k, int bits, uint8_t* codes, int64_t row_begin,
                 int64_t row_end) noexcept {
#define DQ_CALL(B) unpack<B>(packed, k, codes, row_begin, row_end)
    DQ_FOR_BITS(bits, DQ_CALL)
#undef DQ_CALL
}

}  // namespace dq::scalar

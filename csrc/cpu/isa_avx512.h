// AVX-512 (F, BW, VL, DQ) with VNNI: a quad is one register, and vpdpbusd multiplies its 64 unsigned codes with 4 signed
// activations and adds into 16 int32 lanes.
#pragma once

#include <immintrin.h>

#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {

struct Isa {
    // A GEMM tile: 6 tokens x 2 blocks is 12 int32 and 12 float32 accumulators, 2 quads and a few spare of 32 registers.
    static constexpr int kTokens = 6;
    // Tokens that meet a quad in registers at once: 8 sums, 8 of the rests, 8 results.
    static constexpr int kMostFew = 8;

    using Quad = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    template <int Storage>
    struct Sums {
        __m512i v;
    };

    static DQ_INLINE Quad load_quad(const uint8_t* p) { return _mm512_load_si512(p); }
    static DQ_INLINE void store_quad(uint8_t* p, Quad q) { _mm512_store_si512(p, q); }

    template <int Storage>
    static DQ_INLINE void unpack(const uint8_t* p, Quad* q) {
        const __m512i v0 = _mm512_load_si512(p);
        if constexpr (Storage == 8) {
            q[0] = v0;
        } else if constexpr (Storage == 4 || Storage == kTable) {
            const __m512i mask = _mm512_set1_epi8(15);
            q[0] = _mm512_and_si512(v0, mask);
            q[1] = _mm512_and_si512(_mm512_srli_epi16(v0, 4), mask);
        } else if constexpr (Storage == 2) {
            const __m512i mask = _mm512_set1_epi8(3);
            q[0] = _mm512_and_si512(v0, mask);
            q[1] = _mm512_and_si512(_mm512_srli_epi16(v0, 2), mask);
            q[2] = _mm512_and_si512(_mm512_srli_epi16(v0, 4), mask);
            q[3] = _mm512_and_si512(_mm512_srli_epi16(v0, 6), mask);
        } else if constexpr (Storage == 6) {
            const __m512i v1 = _mm512_load_si512(p + 64), v2 = _mm512_load_si512(p + 128);
            const __m512i mask = _mm512_set1_epi8(63), two = _mm512_set1_epi8(3), four = _mm512_set1_epi8(15);
            q[0] = _mm512_and_si512(v0, mask);
            q[1] = _mm512_and_si512(v1, mask);
            q[2] = _mm512_and_si512(v2, mask);
            // 0xCA: bits of the second operand where the first has ones, else of the third.
            const __m512i lower = _mm512_ternarylogic_epi32(two, _mm512_srli_epi16(v0, 6), _mm512_srli_epi16(v1, 4), 0xCA);
            q[3] = _mm512_and_si512(_mm512_ternarylogic_epi32(four, lower, _mm512_srli_epi16(v2, 2), 0xCA), mask);
        } else {
            const __m512i v1 = _mm512_load_si512(p + 64), v2 = _mm512_load_si512(p + 128);
            const __m512i mask = _mm512_set1_epi8(7), low = _mm512_set1_epi8(3);
            q[0] = _mm512_and_si512(v0, mask);
            q[1] = _mm512_and_si512(_mm512_srli_epi16(v0, 3), mask);
            q[2] = _mm512_and_si512(v1, mask);
            q[3] = _mm512_and_si512(_mm512_srli_epi16(v1, 3), mask);
            q[4] = _mm512_and_si512(v2, mask);
            q[5] = _mm512_and_si512(_mm512_srli_epi16(v2, 3), mask);
            // 0xCA: bits of the second operand where the first has ones, else of the third.
            q[6] = _mm512_and_si512(
                _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(v0, 6), _mm512_srli_epi16(v2, 4), 0xCA), mask);
            q[7] = _mm512_and_si512(
                _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(v1, 6), _mm512_srli_epi16(v2, 5), 0xCA), mask);
        }
    }

    static DQ_INLINE Ints splat_int(int32_t v) { return _mm512_set1_epi32(v); }
    static DQ_INLINE Ints zero_times(const uint8_t* zero, int32_t factor) {
        const __m128i z = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zero));
        return _mm512_mullo_epi32(_mm512_cvtepu8_epi32(z), _mm512_set1_epi32(factor));
    }
    static DQ_INLINE Ints load_zero(const uint8_t* zero) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero)));
    }

    template <int Storage>
    static DQ_INLINE void start(Sums<Storage>& sums, Ints first) {
        sums.v = first;
    }
    template <int Storage>
    static DQ_INLINE void dot(Sums<Storage>& sums, Quad q, const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, 4);
        sums.v = _mm512_dpbusd_epi32(sums.v, q, _mm512_set1_epi32(four));
    }
    template <int Storage>
    static DQ_INLINE void flush(Sums<Storage>&) {}
    template <int Storage>
    static DQ_INLINE void scale_up(Sums<Storage>& sums, int32_t factor, Ints first) {
        sums.v = _mm512_add_epi32(_mm512_mullo_epi32(sums.v, _mm512_set1_epi32(factor)), first);
    }
    template <int Storage>
    static DQ_INLINE Floats to_float(const Sums<Storage>& sums) {
        return _mm512_cvtepi32_ps(sums.v);
    }

    // Code j (0 .. 3) of every row of a quad, minus the zero point.
    template <int J>
    static DQ_INLINE Floats value(Quad q, Ints zero) {
        const __m512i shifted = J == 3 ? _mm512_srli_epi32(q, 24)
                                       : _mm512_and_si512(_mm512_srli_epi32(q, 8 * J), _mm512_set1_epi32(255));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(shifted, zero));
    }

    // Bytes of codes below 16 -> the bytes at those places.
    static DQ_INLINE Quad look_up(Quad q, const uint8_t* bytes) {
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), q);
    }
    // Level of code j of every row: only the low 4 bits of a lane count.
    template <int J>
    static DQ_INLINE Floats level(Quad q, const float* values) {
        return _mm512_permutexvar_ps(_mm512_srli_epi32(q, 8 * J), _mm512_loadu_ps(values));
    }

    static DQ_INLINE Floats load16(const uint16_t* p, bool is_bf16) {
        return (__m512)(is_bf16 ? load_bf16(p) : load_half(p));
    }
    static DQ_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
    static DQ_INLINE void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static DQ_INLINE Floats splat_float(float v) { return _mm512_set1_ps(v); }
    static DQ_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static DQ_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static DQ_INLINE Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static DQ_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};

}  // namespace
}  // namespace dq

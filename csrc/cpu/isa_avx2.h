// AVX2 with FMA and F16C: a quad is two registers of 8 rows. vpmaddubsw multiplies unsigned codes with signed
// activations into 16-bit pair sums, which hold 8 quads of codes up to 15 (2 * 15 * 127 * 8 = 30480 < 2^15) before
// flush() widens them. 6- and 8-bit codes go through as two nibbles.
#pragma once

#include <immintrin.h>

#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {

struct Isa {
    // 16 registers: 2 tokens x 2 blocks are 8 16-bit sums; the rest spills, off the inner loop.
    static constexpr int kTokens = 4;
    static constexpr int kMostFew = 4;

    struct Quad {
        __m256i a, b;  // rows 0-7, 8-15
    };
    using Ints = Quad;
    struct Floats {
        __m256 a, b;
    };
    template <int Storage>
    struct Sums {
        __m256i a, b;                      // int32, one lane a row
        __m256i low_a, low_b;              // int16, two lanes a row
        __m256i high_a, high_b;            // the same of the high nibbles, 6 and 8 bits only
    };

    static DQ_INLINE Quad load_quad(const uint8_t* p) {
        const __m256i* v = reinterpret_cast<const __m256i*>(p);
        return {_mm256_load_si256(v), _mm256_load_si256(v + 1)};
    }
    static DQ_INLINE void store_quad(uint8_t* p, Quad q) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(p), q.a);
        _mm256_store_si256(reinterpret_cast<__m256i*>(p) + 1, q.b);
    }
    template <int Shift>
    static DQ_INLINE Quad shifted(Quad v, __m256i mask) {
        return {_mm256_and_si256(_mm256_srli_epi16(v.a, Shift), mask),
                _mm256_and_si256(_mm256_srli_epi16(v.b, Shift), mask)};
    }
    static DQ_INLINE Quad either(Quad u, Quad v) { return {_mm256_or_si256(u.a, v.a), _mm256_or_si256(u.b, v.b)}; }

    template <int Storage>
    static DQ_INLINE void unpack(const uint8_t* p, Quad* q) {
        const Quad v0 = load_quad(p);
        if constexpr (Storage == 8) {
            q[0] = v0;
        } else if constexpr (Storage == 4 || Storage == kTable) {
            const __m256i mask = _mm256_set1_epi8(15);
            q[0] = shifted<0>(v0, mask);
            q[1] = shifted<4>(v0, mask);
        } else if constexpr (Storage == 2) {
            const __m256i mask = _mm256_set1_epi8(3);
            q[0] = shifted<0>(v0, mask);
            q[1] = shifted<2>(v0, mask);
            q[2] = shifted<4>(v0, mask);
            q[3] = shifted<6>(v0, mask);
        } else if constexpr (Storage == 6) {
            const Quad v1 = load_quad(p + 64), v2 = load_quad(p + 128);
            const __m256i mask = _mm256_set1_epi8(63);
            q[0] = shifted<0>(v0, mask);
            q[1] = shifted<0>(v1, mask);
            q[2] = shifted<0>(v2, mask);
            const Quad lower = either(shifted<6>(v0, _mm256_set1_epi8(3)), shifted<4>(v1, _mm256_set1_epi8(12)));
            q[3] = either(lower, shifted<2>(v2, _mm256_set1_epi8(48)));
        } else {
            const Quad v1 = load_quad(p + 64), v2 = load_quad(p + 128);
            const __m256i mask = _mm256_set1_epi8(7), low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(4);
            q[0] = shifted<0>(v0, mask);
            q[1] = shifted<3>(v0, mask);
            q[2] = shifted<0>(v1, mask);
            q[3] = shifted<3>(v1, mask);
            q[4] = shifted<0>(v2, mask);
            q[5] = shifted<3>(v2, mask);
            q[6] = either(shifted<6>(v0, low), shifted<4>(v2, high));
            q[7] = either(shifted<6>(v1, low), shifted<5>(v2, high));
        }
    }

    static DQ_INLINE Ints splat_int(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
    static DQ_INLINE Ints load_zero(const uint8_t* zero) {
        const __m128i* z = reinterpret_cast<const __m128i*>(zero);
        const __m128i* next = reinterpret_cast<const __m128i*>(zero + 8);
        return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(z)), _mm256_cvtepu8_epi32(_mm_loadl_epi64(next))};
    }
    static DQ_INLINE Ints zero_times(const uint8_t* zero, int32_t factor) {
        const Ints z = load_zero(zero);
        const __m256i f = _mm256_set1_epi32(factor);
        return {_mm256_mullo_epi32(z.a, f), _mm256_mullo_epi32(z.b, f)};
    }

    template <int Storage>
    static DQ_INLINE void start(Sums<Storage>& sums, Ints first) {
        const __m256i none = _mm256_setzero_si256();
        sums = {first.a, first.b, none, none, none, none};
    }
    template <int Storage>
    static DQ_INLINE void dot(Sums<Storage>& s, Quad q, const int8_t* x) {
        int32_t bytes;
        std::memcpy(&bytes, x, 4);
        const __m256i four = _mm256_set1_epi32(bytes);
        if constexpr (Storage > 4) {
            const __m256i mask = _mm256_set1_epi8(15);
            const Quad low = shifted<0>(q, mask), high = shifted<4>(q, mask);
            s.low_a = _mm256_add_epi16(s.low_a, _mm256_maddubs_epi16(low.a, four));
            s.low_b = _mm256_add_epi16(s.low_b, _mm256_maddubs_epi16(low.b, four));
            s.high_a = _mm256_add_epi16(s.high_a, _mm256_maddubs_epi16(high.a, four));
            s.high_b = _mm256_add_epi16(s.high_b, _mm256_maddubs_epi16(high.b, four));
        } else {
            s.low_a = _mm256_add_epi16(s.low_a, _mm256_maddubs_epi16(q.a, four));
            s.low_b = _mm256_add_epi16(s.low_b, _mm256_maddubs_epi16(q.b, four));
        }
    }
    template <int Storage>
    static DQ_INLINE void flush(Sums<Storage>& s) {
        const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16), none = _mm256_setzero_si256();
        s.a = _mm256_add_epi32(s.a, _mm256_madd_epi16(s.low_a, ones));
        s.b = _mm256_add_epi32(s.b, _mm256_madd_epi16(s.low_b, ones));
        s.low_a = s.low_b = none;
        if constexpr (Storage > 4) {
            s.a = _mm256_add_epi32(s.a, _mm256_madd_epi16(s.high_a, sixteens));
            s.b = _mm256_add_epi32(s.b, _mm256_madd_epi16(s.high_b, sixteens));
            s.high_a = s.high_b = none;
        }
    }
    template <int Storage>
    static DQ_INLINE void scale_up(Sums<Storage>& s, int32_t factor, Ints first) {
        const __m256i f = _mm256_set1_epi32(factor);
        s.a = _mm256_add_epi32(_mm256_mullo_epi32(s.a, f), first.a);
        s.b = _mm256_add_epi32(_mm256_mullo_epi32(s.b, f), first.b);
    }
    template <int Storage>
    static DQ_INLINE Floats to_float(const Sums<Storage>& s) {
        return {_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)};
    }

    template <int J>
    static DQ_INLINE __m256 value_half(__m256i q, __m256i zero) {
        const __m256i code = J == 3 ? _mm256_srli_epi32(q, 24)
                                    : _mm256_and_si256(_mm256_srli_epi32(q, 8 * J), _mm256_set1_epi32(255));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero));
    }
    template <int J>
    static DQ_INLINE Floats value(Quad q, Ints zero) {
        return {value_half<J>(q.a, zero.a), value_half<J>(q.b, zero.b)};
    }

    static DQ_INLINE Quad look_up(Quad q, const uint8_t* bytes) {
        const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
        return {_mm256_shuffle_epi8(table, q.a), _mm256_shuffle_epi8(table, q.b)};
    }
    // Only the low 3 bits of a lane choose; bit 3 is brought to where the blend looks.
    template <int J>
    static DQ_INLINE __m256 level_half(__m256i q, const float* values) {
        const __m256i code = _mm256_srli_epi32(q, 8 * J);
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), code);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + 8), code);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    }
    template <int J>
    static DQ_INLINE Floats level(Quad q, const float* values) {
        return {level_half<J>(q.a, values), level_half<J>(q.b, values)};
    }

    static DQ_INLINE Floats load16(const uint16_t* p, bool is_bf16) {
        if (is_bf16) return {(__m256)load_bf16(p), (__m256)load_bf16(p + 8)};
        return {(__m256)load_half(p), (__m256)load_half(p + 8)};
    }
    static DQ_INLINE Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static DQ_INLINE void store_floats(float* p, Floats v) {
        _mm256_storeu_ps(p, v.a);
        _mm256_storeu_ps(p + 8, v.b);
    }
    static DQ_INLINE Floats splat_float(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static DQ_INLINE Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
    static DQ_INLINE Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
    static DQ_INLINE Floats mul_add(Floats a, Floats b, Floats c) {
        return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
    }
    static DQ_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};

}  // namespace
}  // namespace dq

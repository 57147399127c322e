// NEON with dot products (ARMv8.2 and later): a quad is four registers of 4 rows. sdot wants signed bytes; codes up to
// 127 are, and 8-bit codes become so by flipping the top bit, which subtracts 128 and is undone through the zero point.
#pragma once

#include <arm_neon.h>

#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {

struct Isa {
    static constexpr int kTokens = 2;  // 2 tokens x 2 blocks: 16 int32 and 16 float32 accumulators of 32 registers
    static constexpr int kMostFew = 4;

    struct Quad {
        uint8x16_t part[4];  // rows 4i .. 4i+3
    };
    struct Ints {
        int32x4_t part[4];
    };
    struct Floats {
        float32x4_t part[4];
    };
    template <int Storage>
    static constexpr bool kBytes = Storage == 8 || Storage == kTable;  // codes that fill a byte
    template <int Storage>
    struct Sums {
        Ints v;
        int32x4_t flipped;  // 8 bits only: 128 * (sum of the activations met), per lane the same
    };

    static DQ_INLINE Quad load_quad(const uint8_t* p) {
        return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
    }
    static DQ_INLINE void store_quad(uint8_t* p, Quad q) {
        for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, q.part[i]);
    }

    template <int Storage>
    static DQ_INLINE void unpack(const uint8_t* p, Quad* q) {
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t v0 = vld1q_u8(p + 16 * i);
            if constexpr (Storage == 8) {
                q[0].part[i] = v0;
            } else if constexpr (Storage == 4 || Storage == kTable) {
                q[0].part[i] = vandq_u8(v0, vdupq_n_u8(15));
                q[1].part[i] = vshrq_n_u8(v0, 4);
            } else if constexpr (Storage == 2) {
                const uint8x16_t mask = vdupq_n_u8(3);
                q[0].part[i] = vandq_u8(v0, mask);
                q[1].part[i] = vandq_u8(vshrq_n_u8(v0, 2), mask);
                q[2].part[i] = vandq_u8(vshrq_n_u8(v0, 4), mask);
                q[3].part[i] = vshrq_n_u8(v0, 6);
            } else if constexpr (Storage == 6) {
                const uint8x16_t v1 = vld1q_u8(p + 64 + 16 * i), v2 = vld1q_u8(p + 128 + 16 * i);
                const uint8x16_t mask = vdupq_n_u8(63);
                q[0].part[i] = vandq_u8(v0, mask);
                q[1].part[i] = vandq_u8(v1, mask);
                q[2].part[i] = vandq_u8(v2, mask);
                const uint8x16_t lower = vorrq_u8(vshrq_n_u8(v0, 6), vandq_u8(vshrq_n_u8(v1, 4), vdupq_n_u8(12)));
                q[3].part[i] = vorrq_u8(lower, vandq_u8(vshrq_n_u8(v2, 2), vdupq_n_u8(48)));
            } else {
                const uint8x16_t v1 = vld1q_u8(p + 64 + 16 * i), v2 = vld1q_u8(p + 128 + 16 * i);
                const uint8x16_t mask = vdupq_n_u8(7), high = vdupq_n_u8(4);
                q[0].part[i] = vandq_u8(v0, mask);
                q[1].part[i] = vandq_u8(vshrq_n_u8(v0, 3), mask);
                q[2].part[i] = vandq_u8(v1, mask);
                q[3].part[i] = vandq_u8(vshrq_n_u8(v1, 3), mask);
                q[4].part[i] = vandq_u8(v2, mask);
                q[5].part[i] = vandq_u8(vshrq_n_u8(v2, 3), mask);
                q[6].part[i] = vorrq_u8(vshrq_n_u8(v0, 6), vandq_u8(vshrq_n_u8(v2, 4), high));
                q[7].part[i] = vorrq_u8(vshrq_n_u8(v1, 6), vandq_u8(vshrq_n_u8(v2, 5), high));
            }
        }
    }

    static DQ_INLINE Ints splat_int(int32_t v) {
        const int32x4_t x = vdupq_n_s32(v);
        return {{x, x, x, x}};
    }
    static DQ_INLINE Ints zero_times(const uint8_t* zero, int32_t factor) {
        Ints z = load_zero(zero);
        for (int i = 0; i < 4; ++i) z.part[i] = vmulq_n_s32(z.part[i], factor);
        return z;
    }
    static DQ_INLINE Ints load_zero(const uint8_t* zero) {
        const uint8x16_t z = vld1q_u8(zero);
        const uint16x8_t low = vmovl_u8(vget_low_u8(z)), high = vmovl_u8(vget_high_u8(z));
        return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
    }

    template <int Storage>
    static DQ_INLINE void start(Sums<Storage>& sums, Ints first) {
        sums.v = first;
        sums.flipped = vdupq_n_s32(0);
    }
    template <int Storage>
    static DQ_INLINE void dot(Sums<Storage>& sums, Quad q, const int8_t* x) {
        int32_t bytes;
        std::memcpy(&bytes, x, 4);
        const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t code = kBytes<Storage> ? veorq_u8(q.part[i], vdupq_n_u8(128)) : q.part[i];
            sums.v.part[i] = vdotq_s32(sums.v.part[i], vreinterpretq_s8_u8(code), four);
        }
        // (code - 128) * x summed lacks 128 * sum(x): 2 * 64 * sum(x), since 128 itself is no signed byte.
        if constexpr (kBytes<Storage>) sums.flipped = vdotq_s32(sums.flipped, vdupq_n_s8(64), four);
    }
    template <int Storage>
    static DQ_INLINE void flush(Sums<Storage>&) {}
    template <int Storage>
    static DQ_INLINE void scale_up(Sums<Storage>& sums, int32_t factor, const Ints& first) {
        for (int i = 0; i < 4; ++i) sums.v.part[i] = vmlaq_n_s32(first.part[i], sums.v.part[i], factor);
        sums.flipped = vmulq_n_s32(sums.flipped, factor);
    }
    template <int Storage>
    static DQ_INLINE Floats to_float(const Sums<Storage>& sums) {
        Floats out;
        for (int i = 0; i < 4; ++i) {
            int32x4_t total = sums.v.part[i];
            if constexpr (kBytes<Storage>) total = vaddq_s32(total, vaddq_s32(sums.flipped, sums.flipped));
            out.part[i] = vcvtq_f32_s32(total);
        }
        return out;
    }

    template <int J>
    static DQ_INLINE Floats value(Quad q, Ints zero) {
        Floats out;
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t lane = vreinterpretq_u32_u8(q.part[i]);
            const uint32x4_t code = vandq_u32(vshlq_u32(lane, vdupq_n_s32(-8 * J)), vdupq_n_u32(255));
            out.part[i] = vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(code), zero.part[i]));
        }
        return out;
    }

    static DQ_INLINE Quad look_up(Quad q, const uint8_t* bytes) {
        const uint8x16_t table = vld1q_u8(bytes);
        for (int i = 0; i < 4; ++i) q.part[i] = vqtbl1q_u8(table, q.part[i]);
        return q;
    }
    // No lookup of floats: the four bytes of one are those at 4 * code .. 4 * code + 3 of the table's 64.
    template <int J>
    static DQ_INLINE Floats level(Quad q, const float* values) {
        const uint8_t* bytes = reinterpret_cast<const uint8_t*>(values);
        const uint8x16x4_t table = {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
        const uint32x4_t within = vdupq_n_u32(0x03020100);
        Floats out;
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t lane = vshlq_u32(vreinterpretq_u32_u8(q.part[i]), vdupq_n_s32(-8 * J));
            const uint32x4_t code = vandq_u32(lane, vdupq_n_u32(15));
            const uint32x4_t at = vaddq_u32(vmulq_n_u32(code, 0x04040404), within);
            out.part[i] = vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(at)));
        }
        return out;
    }

    static DQ_INLINE Floats load16(const uint16_t* p, bool is_bf16) {
        Floats out;
        for (int i = 0; i < 4; ++i) out.part[i] = (float32x4_t)(is_bf16 ? load_bf16(p + 4 * i) : load_half(p + 4 * i));
        return out;
    }
    static DQ_INLINE Floats load_floats(const float* p) {
        return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
    }
    static DQ_INLINE void store_floats(float* p, Floats v) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.part[i]);
    }
    static DQ_INLINE Floats splat_float(float v) {
        const float32x4_t x = vdupq_n_f32(v);
        return {{x, x, x, x}};
    }
    static DQ_INLINE Floats mul(Floats a, Floats b) {
        for (int i = 0; i < 4; ++i) a.part[i] = vmulq_f32(a.part[i], b.part[i]);
        return a;
    }
    static DQ_INLINE Floats add(Floats a, Floats b) {
        for (int i = 0; i < 4; ++i) a.part[i] = vaddq_f32(a.part[i], b.part[i]);
        return a;
    }
    static DQ_INLINE Floats mul_add(Floats a, Floats b, Floats c) {
        for (int i = 0; i < 4; ++i) c.part[i] = vfmaq_f32(c.part[i], a.part[i], b.part[i]);
        return c;
    }
    static DQ_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
};

}  // namespace
}  // namespace dq

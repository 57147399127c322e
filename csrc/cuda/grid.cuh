// The arithmetic of dq_runtime/grids/int_grid.py (scale rule absmax), bit for bit: one group's scale and zero point from
// its extremes, one weight's nearest code. float32 throughout, IEEE division, halves rounded to even, nothing fused.
//
// Rounding to bf16 and fp16 is written with integers, so that g++ compiles and tests what the GPU runs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bits.cuh"

namespace dq {

DQ_HD uint32_t bits_of(float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}

DQ_HD float float_of(uint32_t u) {
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

// Storage of a weight or a scale; the values are those that csrc/cuda's callers pass.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

DQ_HD float from_bf16(uint16_t v) { return float_of(static_cast<uint32_t>(v) << 16); }

// Exact, subnormals included: the exponent field moves to float32's, and the product makes up for the biases' difference.
// Infinity and NaN become numbers from 65536 up, beyond every finite half.
DQ_HD float from_fp16(uint16_t v) {
    const float magnitude = float_of(static_cast<uint32_t>(v & 0x7fff) << 13) * 0x1p112f;
    return float_of(bits_of(magnitude) | static_cast<uint32_t>(v & 0x8000) << 16);
}

// Nearest, ties to even; v finite and not so large that it rounds to infinity.
DQ_HD uint16_t to_bf16(float v) {
    const uint32_t u = bits_of(v);
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Nearest, ties to even; 2^-14 <= v <= 65504, the positive normal halves: what a clamped scale is.
DQ_HD uint16_t to_fp16_normal(float v) {
    const uint32_t u = bits_of(v) - (112u << 23);
    return static_cast<uint16_t>((u + 0xfff + ((u >> 13) & 1)) >> 13);
}

// What a grid needs to know; plain values, so that a kernel takes it as one argument.
struct Grid {
    int bits;
    bool symmetric;
    Dtype scale_dtype;  // kBfloat16 or kFloat16
};

DQ_HD float top(const Grid& g) { return static_cast<float>((1 << g.bits) - 1); }
DQ_HD float middle(const Grid& g) { return static_cast<float>(1 << (g.bits - 1)); }
DQ_HD float largest_scale(const Grid& g) { return g.scale_dtype == kBfloat16 ? 0x1.fep127f : 65504.0f; }
DQ_HD float smallest_scale(const Grid& g) { return g.scale_dtype == kBfloat16 ? 0x1p-126f : 0x1p-14f; }

// The distance between the outermost levels; low <= 0 <= high are the group's extremes.
DQ_HD float span_of(float low, float high, const Grid& g) { return g.symmetric ? 2 * fmaxf(-low, high) : high - low; }

// Whether the scale dtype cannot hold span / top. Multiplied out in double, where the product is exact.
DQ_HD bool overflows(float span, const Grid& g) {
    return static_cast<double>(span) > static_cast<double>(largest_scale(g)) * ((1 << g.bits) - 1);
}

// The stored scale: span / top, clamped to the dtype's normal numbers; 1 for a group of zeros.
DQ_HD uint16_t scale_of(float span, const Grid& g) {
    const float exact = span == 0 ? 1.0f : fminf(fmaxf(span / top(g), smallest_scale(g)), largest_scale(g));
    return g.scale_dtype == kBfloat16 ? to_bf16(exact) : to_fp16_normal(exact);
}

DQ_HD float value_of(uint16_t scale, const Grid& g) {
    return g.scale_dtype == kBfloat16 ? from_bf16(scale) : from_fp16(scale);
}

DQ_HD float nearest_level(float v, const Grid& g) { return fminf(fmaxf(rintf(v), 0.0f), top(g)); }

DQ_HD float zero_of(float low, float scale, const Grid& g) {
    return g.symmetric ? middle(g) : nearest_level(-low / scale, g);
}

DQ_HD uint8_t code_of(float weight, float scale, float zero, const Grid& g) {
    return static_cast<uint8_t>(nearest_level(weight / scale + zero, g));
}

// How a dtype of weights is stored. A lane takes 16 bytes of them at a time, kChunk weights.
template <Dtype D>
struct Stored;

template <>
struct Stored<kFloat32> {
    using Type = uint32_t;
    static constexpr int kChunk = 4;
    static constexpr float kLargest = 0x1.fffffep127f;  // finite weight
    static DQ_HD float value(uint32_t v) { return float_of(v); }
};

template <>
struct Stored<kBfloat16> {
    using Type = uint16_t;
    static constexpr int kChunk = 8;
    static constexpr float kLargest = 0x1.fep127f;
    static DQ_HD float value(uint16_t v) { return from_bf16(v); }
};

template <>
struct Stored<kFloat16> {
    using Type = uint16_t;
    static constexpr int kChunk = 8;
    static constexpr float kLargest = 65504.0f;
    static DQ_HD float value(uint16_t v) { return from_fp16(v); }
};

template <typename T>
struct alignas(16) Chunk {
    T v[16 / sizeof(T)];
};

// `count` weights from memory, zeros after them: zero is inside every group's range, so it changes no extreme.
template <Dtype D>
DQ_HD void load_weights(const typename Stored<D>::Type* p, int count, float (&out)[Stored<D>::kChunk]) {
    using S = Stored<D>;
    if (count == S::kChunk && aligned(p, 16)) {
        const auto chunk = *reinterpret_cast<const Chunk<typename S::Type>*>(p);
        DQ_UNROLL for (int i = 0; i < S::kChunk; ++i) out[i] = S::value(chunk.v[i]);
    } else {
        DQ_UNROLL for (int i = 0; i < S::kChunk; ++i) out[i] = i < count ? S::value(p[i]) : 0.0f;
    }
}

struct Extremes {
    float low, high;  // low <= 0 <= high
    bool finite;
};

DQ_HD Extremes merge(const Extremes& a, const Extremes& b) {
    return {fminf(a.low, b.low), fmaxf(a.high, b.high), a.finite && b.finite};
}

// Lane `lane` of the `lanes` that share a group looks at chunks lane, lane + lanes, ...
template <Dtype D>
DQ_HD Extremes extremes_of_lane(const typename Stored<D>::Type* group, int64_t size, int lane, int lanes) {
    using S = Stored<D>;
    Extremes e{0.0f, 0.0f, true};
    for (int64_t at = static_cast<int64_t>(lane) * S::kChunk; at < size; at += static_cast<int64_t>(lanes) * S::kChunk) {
        float v[S::kChunk];
        load_weights<D>(group + at, size - at < S::kChunk ? static_cast<int>(size - at) : S::kChunk, v);
        DQ_UNROLL for (int i = 0; i < S::kChunk; ++i) {
            e = merge(e, {fminf(v[i], 0.0f), fmaxf(v[i], 0.0f), fabsf(v[i]) <= S::kLargest});  // NaN is not <=
        }
    }
    return e;
}

// ... and then writes their codes. The weights come from the L1 cache this time.
template <Dtype D>
DQ_HD void codes_of_lane(const typename Stored<D>::Type* group, int64_t size, int lane, int lanes, float scale,
                         float zero, const Grid& g, uint8_t* codes) {
    using S = Stored<D>;
    for (int64_t at = static_cast<int64_t>(lane) * S::kChunk; at < size; at += static_cast<int64_t>(lanes) * S::kChunk) {
        const int count = size - at < S::kChunk ? static_cast<int>(size - at) : S::kChunk;
        float v[S::kChunk];
        load_weights<D>(group + at, count, v);
        uint32_t words[S::kChunk / 4] = {};
        DQ_UNROLL for (int i = 0; i < S::kChunk; ++i) {
            words[i / 4] |= static_cast<uint32_t>(code_of(v[i], scale, zero, g)) << (8 * (i % 4));
        }
        uint8_t* out = codes + at;
        if (count == S::kChunk && aligned(out, S::kChunk)) {
            store_words<S::kChunk / 4>(words, S::kChunk / 4, reinterpret_cast<uint32_t*>(out));
        } else {
            DQ_UNROLL for (int i = 0; i < S::kChunk; ++i) {
                if (i < count) out[i] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
            }
        }
    }
}

}  // namespace dq

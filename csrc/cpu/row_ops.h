// Everything of a decoder layer that works on one row of floats. Written once, compiled per instruction set (vec.h).
#pragma once

#include <cmath>

#include "attention.h"
#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {


// What quantize_group leaves behind besides the codes.
struct GroupResult {
    float scale;
    int32_t sum, rest_sum;
};

typedef int8_t vb __attribute__((vector_size(W)));

DQ_INLINE void store_codes(int8_t* to, vf rounded) {
    const vb narrow = __builtin_convertvector(__builtin_convertvector(rounded, vi), vb);
    std::memcpy(to, &narrow, sizeof narrow);
}

inline float round_even(float v) { return (v + 12582912.0f) - 12582912.0f; }
inline float clamp127(float v) { return v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v == v ? v : 0.0f; }

// `range` is what 127 stands for: in 15 bits (Fine), or in 8 with what is beyond apart, which in most groups is nothing. To
// ask which groups would take longer than to compute it: half of the branches would be predicted wrong. The sums are of
// integers, below 2^24 for every group the bindings allow, and so exact in float32.
template <bool Fine>
DQ_INLINE GroupResult quantize_group(const float* x, int64_t count, int64_t padded, float range, int8_t* q, int8_t* rest) {
    // Below 2^-120 the inverse would overflow: such a group is zero. NaN and infinity reach the scale, and the output.
    const bool usable = !(range < 7.5e-37f);
    const float inverse = usable ? 127.0f / range : 0.0f;
    constexpr float kUnit = kOutlierUnit, kShare = 1.0f / kUnit;
    const vf most = splat(127.0f);
    vf sum = vf{}, rest_sum = vf{};
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        vf v = load(x + i) * inverse;
        if (!Fine) {
            const vf beyond = max(min(round_even(v * kShare), most), -most);
            v = v - beyond * kUnit;
            store_codes(rest + i, beyond);
            rest_sum += beyond;
        }
        const vf high = max(min(round_even(v), most), -most);
        store_codes(q + i, high);
        sum += high;
        if (Fine) {
            const vf below = max(min(round_even((v - high) * 256.0f), most), -most);
            store_codes(rest + i, below);
            rest_sum += below;
        }
    }
    float total = sum_of(sum), rest_total = sum_of(rest_sum);
    for (; i < count; ++i) {
        float v = x[i] * inverse, other = 0.0f;
        if (!Fine) {
            other = clamp127(round_even(v * kShare));
            v -= other * kUnit;
        }
        const float high = clamp127(round_even(v));
        q[i] = static_cast<int8_t>(high);
        total += high;
        if (Fine) other = clamp127(round_even((v - high) * 256.0f));
        rest[i] = static_cast<int8_t>(other);
        rest_total += other;
    }
    for (; i < padded; ++i) q[i] = rest[i] = 0;
    GroupResult result{usable ? range / 127.0f : 0.0f, static_cast<int32_t>(total), static_cast<int32_t>(rest_total)};
    if (!Fine) result.sum += kOutlierUnit * result.rest_sum;
    return result;
}

// Which quads of a group have a rest, see Activations::touched.
inline uint32_t touched_quads(const Prepared& w, const int8_t* rest) {
    const int64_t quads = w.padded / 4, per_bit = quads_per_bit(w);
    uint32_t touched = 0;
    int64_t quad = 0;
#if defined(__AVX512F__)
    for (; per_bit == 1 && quad + 16 <= quads; quad += 16) {
        const __m512i sixteen = _mm512_loadu_si512(rest + 4 * quad);
        touched |= static_cast<uint32_t>(_mm512_test_epi32_mask(sixteen, sixteen)) << quad;
    }
#endif
    for (; quad < quads; ++quad) {
        int32_t four;
        std::memcpy(&four, rest + 4 * quad, 4);
        touched |= static_cast<uint32_t>(four != 0) << quad / per_bit;
    }
    return touched;
}

typedef double vd __attribute__((vector_size(8 * W)));

// max |x|, and x^2 added to the lanes of *squares: in float64, so that every instruction set finds the same rms, of which the
// last bit may decide how a value is rounded.
float largest_of(const float* x, int64_t count, vd* squares) {
    vf most = vf{};
    vd sum = *squares;
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const vf v = load(x + i);
        most = max(abs(v), most);
        const vd wide = __builtin_convertvector(v, vd);
        sum += wide * wide;
    }
    float largest = max_of(most);
    for (; i < count; ++i) {
        const float v = std::fabs(x[i]);
        largest = largest > v ? largest : v;
        sum[0] += static_cast<double>(v) * static_cast<double>(v);
    }
    *squares = sum;
    return largest;
}

void quantize(const Prepared& w, const float* x, int64_t stride, bool all_fine, const Activations& a, int64_t begin,
              int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        const float* row = x + token * stride;
        vd squares = vd{};
        // The largest magnitudes pass through the place of the scales.
        for (int64_t g = 0; g < w.groups; ++g) a.scale[a.at(token, g)] = largest_of(row + g * w.group, w.group, &squares);
        double total = 0.0;
        for (int lane = 0; lane < W; ++lane) total += squares[lane];
        const float rms = static_cast<float>(std::sqrt(total / static_cast<double>(w.k)));
        const bool fine = all_fine || rms < 1e-18f;  // smaller squares are denormal: the rms would say nothing
        a.held[token] = fine ? Held::kFifteenBits : Held::kEightBits;
        for (int64_t g = 0; g < w.groups; ++g) {
            const int64_t at = a.at(token, g), column = token * a.columns + g * w.padded;
            const float largest = a.scale[at];
            const bool outliers = !fine && largest > kOutlierAbove * rms;
            const float* x_g = row + g * w.group;
            int8_t *q = a.q + column, *rest = a.rest + column;
            const GroupResult result =
                fine ? quantize_group<true>(x_g, w.group, w.padded, largest, q, rest)
                     : quantize_group<false>(x_g, w.group, w.padded, outliers ? kOutlierRange * rms : largest, q, rest);
            a.scale[at] = result.scale;
            a.sum[at] = result.sum;
            a.rest_sum[at] = result.rest_sum;
            a.touched[at] = fine ? 0 : touched_quads(w, rest);
        }
    }
}

void pad(const Prepared& w, const float* x, int64_t stride, const Activations& a, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        for (int64_t g = 0; g < w.groups; ++g) {
            float* to = a.x + token * a.columns + g * w.padded;
            std::memcpy(to, x + token * stride + g * w.group, static_cast<size_t>(w.group) * sizeof(float));
            for (int64_t i = w.group; i < w.padded; ++i) to[i] = 0.0f;
        }
    }
}

void rms_norm(const float* x, const float* weight, float* out, int64_t n, float eps) {
    vf squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        for (int j = 0; j < 4; ++j) {
            const vf v = load(x + i + j * W);
            squares[j] = fma(v, v, squares[j]);
        }
    }
    float sum = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < n; ++i) sum += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
    for (i = 0; i + W <= n; i += W) store(out + i, load(x + i) * factor * load(weight + i));
    for (; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void add(float* x, const float* y, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(x + i, load(x + i) + load(y + i));
    for (; i < n; ++i) x[i] += y[i];
}

void rope(float* x, const float* cosine, const float* sine, int64_t half) {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const vf a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}

}  // namespace
}  // namespace dq

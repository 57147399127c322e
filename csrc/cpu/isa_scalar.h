// No instruction-set extension: plain loops over 16 rows, the contract of the other isa_*.h files.
#pragma once

#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {

struct Isa {
    static constexpr int kTokens = 4;
    static constexpr int kMostFew = 4;

    struct Quad {
        uint8_t code[4 * kRows];  // [row][column]
    };
    struct Ints {
        int32_t row[kRows];
    };
    struct Floats {
        float row[kRows];
    };
    template <int Storage>
    struct Sums {
        Ints v;
    };

    static Quad load_quad(const uint8_t* p) {
        Quad q;
        std::memcpy(&q, p, sizeof q);
        return q;
    }
    static void store_quad(uint8_t* p, const Quad& q) { std::memcpy(p, &q, sizeof q); }

    template <int Storage>
    static void unpack(const uint8_t* p, Quad* q) {
        for (int i = 0; i < 64; ++i) {
            const int v0 = p[i];
            if constexpr (Storage == 8) {
                q[0].code[i] = p[i];
            } else if constexpr (Storage == 4 || Storage == kTable) {
                q[0].code[i] = v0 & 15;
                q[1].code[i] = static_cast<uint8_t>(v0 >> 4);
            } else if constexpr (Storage == 2) {
                for (int j = 0; j < 4; ++j) q[j].code[i] = v0 >> (2 * j) & 3;
            } else if constexpr (Storage == 6) {
                const int v1 = p[64 + i], v2 = p[128 + i];
                q[0].code[i] = v0 & 63;
                q[1].code[i] = v1 & 63;
                q[2].code[i] = v2 & 63;
                q[3].code[i] = static_cast<uint8_t>(v0 >> 6 | (v1 >> 4 & 12) | (v2 >> 2 & 48));
            } else {
                const int v1 = p[64 + i], v2 = p[128 + i];
                q[0].code[i] = v0 & 7;
                q[1].code[i] = v0 >> 3 & 7;
                q[2].code[i] = v1 & 7;
                q[3].code[i] = v1 >> 3 & 7;
                q[4].code[i] = v2 & 7;
                q[5].code[i] = v2 >> 3 & 7;
                q[6].code[i] = static_cast<uint8_t>(v0 >> 6 | (v2 >> 4 & 4));
                q[7].code[i] = static_cast<uint8_t>(v1 >> 6 | (v2 >> 5 & 4));
            }
        }
    }

    static Ints splat_int(int32_t v) {
        Ints out;
        for (int r = 0; r < kRows; ++r) out.row[r] = v;
        return out;
    }
    static Ints zero_times(const uint8_t* zero, int32_t factor) {
        Ints out;
        for (int r = 0; r < kRows; ++r) out.row[r] = zero[r] * factor;
        return out;
    }
    static Ints load_zero(const uint8_t* zero) { return zero_times(zero, 1); }

    template <int Storage>
    static void start(Sums<Storage>& sums, const Ints& first) {
        sums.v = first;
    }
    template <int Storage>
    static void dot(Sums<Storage>& sums, const Quad& q, const int8_t* x) {
        for (int r = 0; r < kRows; ++r) {
            const uint8_t* c = q.code + 4 * r;
            sums.v.row[r] += c[0] * x[0] + c[1] * x[1] + c[2] * x[2] + c[3] * x[3];
        }
    }
    template <int Storage>
    static void flush(Sums<Storage>&) {}
    // sums = factor * sums + first; everything has been flushed.
    template <int Storage>
    static void scale_up(Sums<Storage>& sums, int32_t factor, const Ints& first) {
        for (int r = 0; r < kRows; ++r) sums.v.row[r] = factor * sums.v.row[r] + first.row[r];
    }
    template <int Storage>
    static Floats to_float(const Sums<Storage>& sums) {
        Floats out;
        for (int r = 0; r < kRows; ++r) out.row[r] = static_cast<float>(sums.v.row[r]);
        return out;
    }

    template <int J>
    static Floats value(const Quad& q, const Ints& zero) {
        Floats out;
        for (int r = 0; r < kRows; ++r) out.row[r] = static_cast<float>(q.code[4 * r + J] - zero.row[r]);
        return out;
    }

    static Quad look_up(const Quad& q, const uint8_t* bytes) {
        Quad out;
        for (int i = 0; i < 4 * kRows; ++i) out.code[i] = bytes[q.code[i]];
        return out;
    }
    template <int J>
    static Floats level(const Quad& q, const float* values) {
        Floats out;
        for (int r = 0; r < kRows; ++r) out.row[r] = values[q.code[4 * r + J]];
        return out;
    }

    static Floats load16(const uint16_t* p, bool is_bf16) {
        Floats out;
        for (int r = 0; r < kRows; r += W) store(out.row + r, is_bf16 ? load_bf16(p + r) : load_half(p + r));
        return out;
    }
    static Floats load_floats(const float* p) {
        Floats out;
        std::memcpy(&out, p, sizeof out);
        return out;
    }
    static void store_floats(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }
    static Floats splat_float(float v) {
        Floats out;
        for (int r = 0; r < kRows; ++r) out.row[r] = v;
        return out;
    }
    static Floats mul(const Floats& a, const Floats& b) {
        Floats out;
        for (int r = 0; r < kRows; ++r) out.row[r] = a.row[r] * b.row[r];
        return out;
    }
    static Floats add(const Floats& a, const Floats& b) {
        Floats out;
        for (int r = 0; r < kRows; ++r) out.row[r] = a.row[r] + b.row[r];
        return out;
    }
    static Floats mul_add(const Floats& a, const Floats& b, const Floats& c) {
        Floats out;
        for (int r = 0; r < kRows; ++r) out.row[r] = a.row[r] * b.row[r] + c.row[r];
        return out;
    }
    static void prefetch(const void*) {}
};

}  // namespace
}  // namespace dq

// Which rows of a head to refine, and how; see head.h.
#pragma once

#include "head.h"
#include "prepared.h"
#include "vec.h"

namespace dq {
namespace {

int64_t count_above(const float* logits, int64_t n, float floor) {
    vi found = vi{};
    int64_t i = 0, count = 0;
    for (; i + W <= n; i += W) found -= load(logits + i) > floor;  // true is -1
    for (int lane = 0; lane < W; ++lane) count += found[lane];
    for (; i < n; ++i) count += logits[i] > floor;
    return count;
}

// The rows of the largest logits [n], at most most_refined(n) of them and none kReach below the largest, into `rows` (one
// entry longer than that); their number. The floor is the lowest of 1/8 nat steps that lets no more through, bisected:
// counting is a vector operation, sorting into bins took 8% of a pass of eight.
int64_t choose(const float* logits, int64_t n, int32_t* rows) {
    vf most = splat(logits[0]);
    int64_t i = 0;
    for (; i + W <= n; i += W) most = max(load(logits + i), most);
    float top = max_of(most);
    for (; i < n; ++i) top = logits[i] > top ? logits[i] : top;
    if (!(top - top == 0.0f)) return 0;  // infinite or NaN: whoever samples will see it

    constexpr float kStep = 0.125f;
    int few = 0, many = static_cast<int>(kReach / kStep) + 1;  // steps below the top, with few enough rows and with too many
    while (many - few > 1) {
        const int middle = (few + many) / 2;
        (count_above(logits, n, top - kStep * static_cast<float>(middle)) <= most_refined(n) ? few : many) = middle;
    }
    const float floor = top - kStep * static_cast<float>(few);
    int64_t count = 0;
    for (int64_t first = 0; first < n; first += 64) {
        const int64_t end = first + 64 < n ? first + 64 : n;
        if (end == first + 64) {
            vf largest = load(logits + first);
            for (int64_t at = first + W; at < end; at += W) largest = max(load(logits + at), largest);
            if (!(max_of(largest) > floor)) continue;
        }
        for (int64_t row = first; row < end; ++row) {
            rows[count] = static_cast<int32_t>(row);
            count += logits[row] > floor;
        }
    }
    return count;
}

// Adds the products of the lower planes of `rows` with x [k] to their logits.
void refine(const Prepared& head, const float* x, const int32_t* rows, int64_t count, float* logits) {
    typedef uint8_t vub __attribute__((vector_size(W)));
    const int64_t stride = head.rest_stride();
    const auto prefetch_row = [&](int64_t row) {  // a third of a microsecond away
        for (int64_t line = 0; line < stride + 64; line += 64) __builtin_prefetch(head.rest + row * stride + line);
    };
    for (int64_t at = 0; at < count && at < 4; ++at) prefetch_row(rows[at]);
    for (int64_t at = 0; at < count; ++at) {
        const int64_t row = rows[at];
        if (at + 4 < count) prefetch_row(rows[at + 4]);
        const uint8_t* rest = head.rest + row * stride;
        vf sums = vf{};
        for (int64_t c = 0; c < head.k; c += 64, rest += kRestBytes) {
            vf group[2] = {};
            for (int i = 0; i < 16; i += W) {
                vub bytes;
                std::memcpy(&bytes, rest + i, sizeof bytes);
                const vi four = __builtin_convertvector(bytes, vi);
                for (int j = 0; j < 4; ++j) {
                    const vf low = __builtin_convertvector(four >> (2 * j) & 3, vf) - 1.5f;
                    group[j / 2] = fma(low, load(x + c + 16 * j + i), group[j / 2]);
                }
            }
            for (int half = 0; half < 2; ++half) {
                uint16_t scale;
                std::memcpy(&scale, rest + 16 + 2 * half, 2);
                const uint32_t wide = static_cast<uint32_t>(scale) << 16;
                float step;
                std::memcpy(&step, &wide, 4);
                sums = fma(splat(step), group[half], sums);
            }
        }
        logits[row] += 0.25f * sum_of(sums);  // the stored scale is that of the upper plane
    }
}

}  // namespace
}  // namespace dq

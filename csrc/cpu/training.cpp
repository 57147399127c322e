#include "training.h"

#include <atomic>

#include "kernels.h"
#include "pool.h"
#include "vec.h"

namespace dq {
namespace {

constexpr int64_t kPiece = 1 << 14;  // elements of a unit: 350 KB of state, some 20 us

}  // namespace

int64_t projected_adam(const AdamState& state, int64_t count, const AdamStep& step, int threads) {
    std::atomic<int64_t> undecided{0};
    const auto kernel = kernels().adam;
    parallel_rows((count + kPiece - 1) / kPiece, threads, [&](int64_t begin, int64_t end) {
        const int64_t from = begin * kPiece, to = end * kPiece < count ? end * kPiece : count;
        undecided.fetch_add(kernel(state.from(from), to - from, step), std::memory_order_relaxed);
    });
    return undecided.load();
}

void lerp_weight(const LerpWeight& w, float* out, int threads) {
    const int64_t groups = w.k / w.group_size;
    parallel_rows(w.n, threads, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin * groups; at < end * groups; ++at) {
            float scale = float_of_half(w.scale[at]);
            if (w.scale_is_bf16) {
                const uint32_t wide = static_cast<uint32_t>(w.scale[at]) << 16;
                std::memcpy(&scale, &wide, 4);
            }
            const float zero = static_cast<float>(w.zero ? w.zero[at] : w.middle);
            const float* __restrict x = w.x + at * w.group_size;
            const uint8_t* __restrict lo = w.lo + at * w.group_size;
            float* __restrict to = out + at * w.group_size;
            for (int64_t i = 0; i < w.group_size; ++i) to[i] = ((x[i] + static_cast<float>(lo[i])) - zero) * scale;
        }
    });
}

}  // namespace dq

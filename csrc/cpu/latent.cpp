#include "latent.h"

#include <algorithm>
#include <mutex>

#include "kernels.h"
#include "pieces.h"

namespace dq {

void latent_weight(const LatentWeight& w, int threads) {
    const auto kernel = kernels().latent.weight;
    in_pieces(w.scale.n, w.scale.k, threads, [&](int64_t begin, int64_t end) { kernel(w, begin, end); });
}

float latent_largest(const LatentState& s, int threads) {
    const auto kernel = kernels().latent.largest;
    std::mutex mutex;
    float largest = 0;
    in_pieces(s.n, s.k, threads, [&](int64_t begin, int64_t end) {
        const float found = kernel(s, begin, end);
        const std::lock_guard<std::mutex> lock(mutex);
        largest = std::max(largest, found);
    });
    return largest;
}

void latent_step(const LatentState& s, const LatentStep& step, int threads) {
    const auto kernel = kernels().latent.step;
    in_pieces(s.n, s.k, threads, [&](int64_t begin, int64_t end) { kernel(s, step, begin, end); });
}

}  // namespace dq

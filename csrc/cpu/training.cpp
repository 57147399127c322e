#include "training.h"

#include <atomic>
#include <vector>

#include "kernels.h"
#include "pieces.h"

namespace dq {
int64_t projected_adam(const AdamState& state, int64_t count, const AdamStep& step, int threads) {
    std::atomic<int64_t> undecided{0};
    const auto kernel = kernels().training.adam;
    in_pieces(count, 1, threads, [&](int64_t from, int64_t to) {
        undecided.fetch_add(kernel(state.from(from), to - from, step), std::memory_order_relaxed);
    });
    return undecided.load();
}

void lerp_weight(const LerpWeight& w, int threads) {
    const auto kernel = kernels().training.lerp_weight;
    in_pieces(w.scale.n, w.scale.k, threads, [&](int64_t begin, int64_t end) { kernel(w, begin, end); });
}

void scale_grad(const ScaledGrad& g, int threads) {
    const auto kernel = kernels().training.scale_grad;
    in_pieces(g.scale.n, g.scale.k, threads, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
}

double mean_kl(const LogitRows& rows, int threads) {
    std::vector<double> kl(static_cast<size_t>(rows.tokens));  // added in order: the same sum for any number of threads
    const auto kernel = kernels().training.token_kl;
    parallel_rows(rows.tokens, threads, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) kl[static_cast<size_t>(token)] = kernel(rows, token);
    });
    double total = 0;
    for (const double each : kl) total += each;
    return total / static_cast<double>(rows.tokens);
}

}  // namespace dq

#include "training_rows.h"

#include "kernels.h"
#include "pool.h"

namespace dq {
namespace {

constexpr int64_t kPiece = 1 << 13;  // elements of a unit; a multiple of every vector

template <typename Kernel>
void elements(int64_t count, int threads, const Kernel& kernel) {
    parallel_rows((count + kPiece - 1) / kPiece, threads, [&](int64_t begin, int64_t end) {
        kernel(begin * kPiece, end * kPiece < count ? end * kPiece : count);
    });
}

}  // namespace

void norm_forward(const NormForward& n, int threads) {
    const auto kernel = kernels().rows.norm;
    parallel_rows(n.rows, threads, [&](int64_t begin, int64_t end) { kernel(n, begin, end); });
}

void norm_backward(const NormBackward& n, int threads) {
    const auto kernel = kernels().rows.norm_backward;
    parallel_rows(n.rows, threads, [&](int64_t begin, int64_t end) { kernel(n, begin, end); });
}

void gated_forward(const GatedForward& g, int threads) {
    const auto kernel = kernels().rows.gated;
    elements(g.count, threads, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
}

void gated_backward(const GatedBackward& g, int threads) {
    const auto kernel = kernels().rows.gated_backward;
    elements(g.count, threads, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
}

}  // namespace dq

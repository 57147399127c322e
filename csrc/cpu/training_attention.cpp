#include "training_attention.h"

#include "kernels.h"
#include "pool.h"

namespace dq {
namespace {

// kernel(a, head, part of it) for every head and every one of `parts`, the last parts of all heads first: in causal
// attention the last tile of queries has most keys, and the longest unit should not begin last.
template <typename Call>
void each(const Call& a, void (*kernel)(const Call&, int64_t, int64_t), int64_t heads, int64_t parts, int threads) {
    parallel_rows(heads * parts, threads, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) kernel(a, unit % heads, parts - 1 - unit / heads);
    });
}

}  // namespace

void attention_forward(const AttentionForward& a, int threads) {
    const AttentionKernels& kernel = kernels().attention;
    each(a, kernel.prepare_keys, a.shape.key_heads, a.shape.tiles(), threads);
    each(a, kernel.forward, a.shape.heads, a.shape.tiles(), threads);
}

void attention_backward(const AttentionBackward& a, int threads) {
    const AttentionKernels& kernel = kernels().attention;
    const AttentionShape& s = a.forward.shape;
    each(a, kernel.prepare_backward_keys, s.key_heads, s.tiles(), threads);
    each(a, kernel.prepare_backward, s.heads, s.tiles(), threads);
    each(a, kernel.backward, s.heads, kParts, threads);
    each(a, kernel.finish_keys, s.key_heads, s.tiles(), threads);
    each(a, kernel.finish, s.heads, s.tiles(), threads);
}

}  // namespace dq

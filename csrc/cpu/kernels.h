// What one instruction set offers: a table of functions, all pure, none of them threaded. kernels_scalar.cpp is the
// contract; the others differ from it by float32 rounding only (the integer sums are the same, bit for bit).
#pragma once

#include <cstdint>

#include "attention.h"
#include "head.h"
#include "prepared.h"
#include "latent.h"
#include "training.h"
#include "training_attention.h"
#include "training_rows.h"

namespace dq {

// Which tokens and which blocks of a matmul to do, and where per-thread scratch lies (64-byte aligned).
struct Tile {
    int64_t token_begin, token_end;
    int64_t block_begin, block_end;  // even counts where the epilogue pairs blocks
    void* scratch;                   // scratch_bytes(w, exact), needed above kFewTokens tokens and for bfloat16
};

// Up to this many tokens a block is unpacked in registers; above, into scratch, and read back per 6 tokens.
constexpr int kFewTokens = 16;

// In a token that is not fine, groups whose largest magnitude exceeds so many times the row's rms have outliers, and
// their scale is that of so many times the rms.
constexpr float kOutlierAbove = 2.75f, kOutlierRange = 1.9f;
// Up to so many tokens a matmul waits for memory, and 15 bits for all of them cost nothing.
constexpr int64_t kFineTokens = 4;

inline int64_t scratch_bytes(const Prepared& w, bool exact) {
    return exact ? 8 * kRows * w.columns() : 4 * kRows * half_columns_of(w.columns());
}

struct Kernels {
    const char* name;

    // Activations in integers (prepared.h), for tokens begin .. end-1 of x [tokens, k] with `stride` floats between tokens.
    void (*quantize)(const Prepared& w, const float* x, int64_t stride, bool all_fine, const Activations& a, int64_t begin,
                     int64_t end);
    // The exact path's counterpart: copies x into a.x, padded.
    void (*pad)(const Prepared& w, const float* x, int64_t stride, const Activations& a, int64_t begin, int64_t end);

    // y = epilogue(a @ decode(w).T): exact int32 sums per group, each times scale * activation scale, added in group
    // order in float32, in a fine token a group's rest after its q. Of tokens in bfloat16: products with weights rounded
    // to bfloat16, added in float32. An element depends on its token, how that is held, and its row only.
    void (*matmul_int8)(const Prepared& w, const Activations& a, const Output& out, const Tile& tile);
    // The same with float32 activations and exactly decoded weights: a group's products added column by column, then that
    // sum times the scale. An element depends on its token and row only here too. |error| <= (columns + 4) u sum |x| |w|.
    void (*matmul_exact)(const Prepared& w, const Activations& a, const Output& out, const Tile& tile);

    // out[i] = x[i] / rms(x) * weight[i], with rms(x) = sqrt(mean(x^2) + eps).
    void (*rms_norm)(const float* x, const float* weight, float* out, int64_t n, float eps);
    // The lower plane of a head (head.h): which of the n rows to refine, into rows [most_refined(n) + 1], returning how
    // many; and logits[row] += lower plane of the row . x for each of them.
    int64_t (*choose)(const float* logits, int64_t n, int32_t* rows);
    void (*refine)(const Prepared& head, const float* x, const int32_t* rows, int64_t count, float* logits);

    void (*add)(float* x, const float* y, int64_t n);                 // x += y
    void (*rope)(float* x, const float* cosine, const float* sine, int64_t half);  // rotates x[:half], x[half:2*half]

    void (*attend)(const AttendUnit& unit);
    void (*store_key_value)(const float* key, const float* value, const KeyValue& cache, int64_t position);

    TrainingKernels training;
    AttentionKernels attention;
    RowKernels rows;
    LatentKernels latent;

    // `quantize` for tokens of prompts, in bfloat16; nullptr where matmul_int8 does not take that.
    void (*round)(const Prepared& w, const float* x, int64_t stride, const Activations& a, int64_t begin, int64_t end) = nullptr;
};

// The best table this CPU runs, or the one DQ_ISA names; throws std::runtime_error, in one sentence, where that is
// unknown, not compiled in, or not supported by the CPU.
const Kernels& kernels();

#ifdef DQ_HAVE_SCALAR
extern const Kernels kScalarKernels;
#endif
#ifdef DQ_HAVE_AVX2
extern const Kernels kAvx2Kernels;
#endif
#ifdef DQ_HAVE_AVX512
extern const Kernels kAvx512Kernels;
#endif
#ifdef DQ_HAVE_AMX  // with which AVX-512 is always compiled too
const Kernels& amx_kernels();
#endif
#ifdef DQ_HAVE_NEON
extern const Kernels kNeonKernels;
#endif

}  // namespace dq

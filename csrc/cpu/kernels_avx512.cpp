// The kernels for AVX-512 with VNNI (Cascade Lake, Zen 4 and later).
#include "isa_avx512.h"

#include "attention_impl.h"
#include "head_impl.h"
#include "kernels.h"
#include "latent_impl.h"
#include "matmul_impl.h"
#include "row_ops.h"
#include "training_attention_impl.h"
#include "training_impl.h"
#include "training_rows_impl.h"

namespace dq {
const Kernels kAvx512Kernels = {"avx512", quantize, pad, matmul_int8, matmul_exact, rms_norm, choose, refine, add, rope, attend,
                            store_key_value, {adam, lerp_weight, scale_grad, token_kl}, kAttention, kRowPasses,
                            kLatentPasses};
}  // namespace dq

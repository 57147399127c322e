// The CPU passes of the rounding loop from Python; dq_runtime/backends/training_native.py vouches for shapes and dtypes.

#include "bindings.h"
#include "cpu/training.h"

namespace dq::binding {
namespace {

int64_t adam(uintptr_t x, uintptr_t grad, uintptr_t m, uintptr_t v, uintptr_t y, uintptr_t free, int64_t count,
             float kl_weight, float clamp, float beta1, float beta2, float epsilon, float decay, float rate,
             float root_correction, int threads) {
    positive(count, "count");
    const AdamStep step{kl_weight, clamp, beta1, beta2, epsilon, decay, rate, root_correction};
    const AdamState state{address<float>(x, "x"),       address<float>(m, "m"),
                          address<float>(v, "v"),       address<const float>(grad, "grad"),
                          address<const float>(y, "y"), address<const uint8_t>(free, "free")};
    py::gil_scoped_release release;
    return projected_adam(state, count, step, threads);
}

void lerp(uintptr_t lo, uintptr_t x, uintptr_t scale, bool scale_is_bf16, uintptr_t zero, int middle, int64_t n,
          int64_t k, int64_t group_size, uintptr_t out, bool out_is_bf16, int threads) {
    const LerpWeight w{group_scales(scale, scale_is_bf16, n, k, group_size),
                       address<const uint8_t>(lo, "lo"),
                       address<const float>(x, "x"),
                       reinterpret_cast<const uint8_t*>(zero),
                       middle,
                       floats(out, "out", out_is_bf16),
                       out_is_bf16};
    py::gil_scoped_release release;
    lerp_weight(w, threads);
}

void scaled(uintptr_t grad, bool grad_is_bf16, uintptr_t scale, bool scale_is_bf16, int64_t n, int64_t k,
            int64_t group_size, uintptr_t out, int threads) {
    const ScaledGrad g{group_scales(scale, scale_is_bf16, n, k, group_size), floats(grad, "grad", grad_is_bf16),
                       grad_is_bf16, address<float>(out, "out")};
    py::gil_scoped_release release;
    scale_grad(g, threads);
}

double kl(uintptr_t student, uintptr_t teacher, uintptr_t grad, bool bf16, int64_t tokens, int64_t vocabulary,
          int threads) {
    positive(tokens, "M");
    positive(vocabulary, "V");
    const LogitRows rows{floats(student, "student", bf16), floats(teacher, "teacher", bf16), floats(grad, "grad", bf16),
                         bf16, tokens, vocabulary};
    py::gil_scoped_release release;
    return mean_kl(rows, threads);
}

}  // namespace

void bind_training(py::module_& module) {
    using py::arg;
    module.def("projected_adam", &adam, arg("x"), arg("grad"), arg("m"), arg("v"), arg("y"), arg("free"), arg("count"),
               arg("kl_weight"), arg("clamp"), arg("beta1"), arg("beta2"), arg("epsilon"), arg("decay"), arg("rate"),
               arg("root_correction"), arg("threads"), "One step in place; returns how many x are undecided.");
    module.def("lerp_weight", &lerp, arg("lo"), arg("x"), arg("scale"), arg("scale_is_bf16"), arg("zero"),
               arg("middle"), arg("N"), arg("K"), arg("group_size"), arg("out"), arg("out_is_bf16"), arg("threads"),
               "out float32 or bfloat16 [N, K] = scale * (lo - zero + x).");
    module.def("scale_grad", &scaled, arg("grad"), arg("grad_is_bf16"), arg("scale"), arg("scale_is_bf16"), arg("N"),
               arg("K"), arg("group_size"), arg("out"), arg("threads"), "out float32 [N, K] = grad * scale.");
    module.def("mean_kl", &kl, arg("student"), arg("teacher"), arg("grad"), arg("bf16"), arg("M"), arg("V"),
               arg("threads"), "Mean KL(teacher || student) of logits [M, V]; its gradient to the student into grad.");
}

}  // namespace dq::binding

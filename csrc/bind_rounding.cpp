// The column walk of layerwise rounding, and the passes over a four-byte latent, from Python;
// dq_runtime/rounding/feedback.py and latent_native.py vouch for shapes and dtypes.

#include "bindings.h"
#include "cpu/gptq.h"
#include "cpu/latent.h"

namespace dq::binding {
namespace {

void gptq(uintptr_t values, uintptr_t target, uintptr_t feedback, uintptr_t carry, uintptr_t scale, uintptr_t zero,
          uintptr_t group, uintptr_t around, int reach, uintptr_t codes, uintptr_t delta, int64_t n, int columns,
          int64_t stride, int64_t groups, int top, int threads) {
    positive(n, "N");
    positive(columns, "columns");
    positive(groups, "groups");
    if (columns > kMostColumns) {
        throw py::value_error("columns must be at most " + std::to_string(kMostColumns) + ", got " +
                              std::to_string(columns));
    }
    if (stride < columns) throw py::value_error("stride must be at least columns");
    if (top < 1 || top > 255) throw py::value_error("top must be from 1 to 255, got " + std::to_string(top));
    if (reach < 0) throw py::value_error("reach cannot be negative, got " + std::to_string(reach));
    const auto* group_of = address<const int32_t>(group, "group");
    for (int j = 0; j < columns; ++j) {
        if (group_of[j] < 0 || group_of[j] >= groups) throw py::value_error("group holds an index beyond groups");
    }
    const GptqBlock block{address<float>(values, "values"),
                          address<const float>(target, "target"),
                          address<const float>(feedback, "feedback"),
                          carry ? address<const float>(carry, "carry") : nullptr,
                          address<const float>(scale, "scale"),
                          address<const float>(zero, "zero"),
                          group_of,
                          reinterpret_cast<const uint8_t*>(around),
                          address<uint8_t>(codes, "codes"),
                          address<float>(delta, "delta"),
                          n,
                          stride,
                          groups,
                          columns,
                          top,
                          reach};
    const int useful = useful_threads(threads, n, static_cast<int64_t>(columns) * columns / 2);
    py::gil_scoped_release release;
    gptq_block(block, useful);
}

void decoded(uintptr_t u, uintptr_t scale, bool scale_is_bf16, uintptr_t zero, int bits, int64_t n, int64_t k,
             int64_t group_size, uintptr_t out, bool out_is_bf16, int threads) {
    check_bits(bits);
    const LatentWeight w{group_scales(scale, scale_is_bf16, n, k, group_size),
                         address<const int16_t>(u, "u"),
                         reinterpret_cast<const uint8_t*>(zero),
                         bits,
                         floats(out, "out", out_is_bf16),
                         out_is_bf16};
    py::gil_scoped_release release;
    latent_weight(w, threads);
}

LatentState state(uintptr_t u, uintptr_t m, uintptr_t v, uintptr_t grad, bool grad_is_bf16, uintptr_t row,
                  uintptr_t column, int64_t n, int64_t k) {
    positive(n, "N");
    positive(k, "K");
    return {n,
            k,
            address<int16_t>(u, "u"),
            address<int8_t>(m, "m"),
            address<uint8_t>(v, "v"),
            floats(grad, "grad", grad_is_bf16),
            grad_is_bf16,
            address<const float>(row, "row"),
            address<const float>(column, "column")};
}

}  // namespace

void bind_rounding(py::module_& module) {
    using py::arg;
    module.def("gptq_block", &gptq, arg("values"), arg("target"), arg("feedback"), arg("carry"), arg("scale"),
               arg("zero"), arg("group"), arg("around"), arg("reach"), arg("codes"), arg("delta"), arg("N"),
               arg("columns"), arg("stride"), arg("groups"), arg("top"), arg("threads"),
               "Rounds up to 128 columns with error feedback; see csrc/cpu/gptq.h.");
    module.def("latent_weight", &decoded, arg("u"), arg("scale"), arg("scale_is_bf16"), arg("zero"), arg("bits"),
               arg("N"), arg("K"), arg("group_size"), arg("out"), arg("out_is_bf16"), arg("threads"),
               "out float32 or bfloat16 [N, K] = scale * (code(u) - zero).");
    py::class_<LatentState>(module, "LatentState", "What a step of the latents [N, K] reads and writes: addresses.")
        .def(py::init(&state), arg("u"), arg("m"), arg("v"), arg("grad"), arg("grad_is_bf16"), arg("row"),
             arg("column"), arg("N"), arg("K"));
    module.def(
        "latent_largest",
        [](const LatentState& s, int threads) {
            py::gil_scoped_release release;
            return latent_largest(s, threads);
        },
        arg("state"), arg("threads"), "The largest |gradient|; infinity where one is not a number.");
    module.def(
        "latent_step",
        [](const LatentState& s, double beta1, double beta2, float held, int lowest, int lowest_after, float correction,
           float per_share, float rate, int threads) {
            const auto rest = [](double beta) { return static_cast<float>(1 - beta); };
            const LatentStep step{static_cast<float>(beta1), rest(beta1), static_cast<float>(beta2), rest(beta2), held,
                                  lowest, lowest_after, correction, per_share, rate};
            py::gil_scoped_release release;
            latent_step(s, step, threads);
        },
        arg("state"), arg("beta1"), arg("beta2"), arg("held"), arg("lowest"), arg("lowest_after"), arg("correction"),
        arg("per_share"), arg("rate"), arg("threads"), "One step of Adam in place; see csrc/cpu/latent.h.");
}

}  // namespace dq::binding

// The passes between the matrix products of a layer in training, from Python; dq_runtime/backends/layers_native.py
// vouches for shapes and dtypes. Addresses of 0 stand for what is not there.

#include "bindings.h"
#include "cpu/training_attention.h"
#include "cpu/training_rows.h"

namespace dq::binding {
namespace {

void* maybe(uintptr_t value, const char* name, bool half) { return value ? floats(value, name, half) : nullptr; }

AttentionShape shape_of(int64_t tokens, int64_t heads, int64_t key_heads, int64_t dim) {
    positive(tokens, "M");
    positive(heads, "heads");
    positive(key_heads, "key_heads");
    positive(dim, "dim");
    if (heads % key_heads != 0) throw py::value_error("key_heads must divide heads");
    if (dim % 32 != 0 || dim > 256) throw py::value_error("dim must be a multiple of 32 up to 256");
    return {tokens, heads, key_heads, dim};
}

AttentionForward attention(uintptr_t q, uintptr_t k, uintptr_t v, bool bf16, uintptr_t cosine, uintptr_t sine,
                           float scale, const AttentionShape& shape, uintptr_t out, uintptr_t log_sum,
                           uintptr_t workspace) {
    return {shape,
            floats(q, "q", bf16),
            floats(k, "k", bf16),
            floats(v, "v", bf16),
            bf16,
            address<const float>(cosine, "cosine"),
            address<const float>(sine, "sine"),
            scale,
            floats(out, "out", bf16),
            address<float>(log_sum, "log_sum"),
            address<float>(workspace, "workspace")};
}

}  // namespace

void bind_layers(py::module_& module) {
    using py::arg;
    module.def(
        "attention_floats",
        [](int64_t tokens, int64_t heads, int64_t key_heads, int64_t dim) {
            const AttentionShape s = shape_of(tokens, heads, key_heads, dim);
            return py::make_tuple(forward_floats(s), AttentionWorkspace::floats(s), s.heads * s.padded());
        },
        arg("M"), arg("heads"), arg("key_heads"), arg("dim"),
        "float32 of the workspace forward, of that backward, and of log_sum.");
    module.def(
        "attention_forward",
        [](uintptr_t q, uintptr_t k, uintptr_t v, bool bf16, uintptr_t cosine, uintptr_t sine, float scale,
           int64_t tokens, int64_t heads, int64_t key_heads, int64_t dim, uintptr_t out, uintptr_t log_sum,
           uintptr_t workspace, int threads) {
            const AttentionForward a = attention(q, k, v, bf16, cosine, sine, scale,
                                                 shape_of(tokens, heads, key_heads, dim), out, log_sum, workspace);
            py::gil_scoped_release release;
            attention_forward(a, threads);
        },
        arg("q"), arg("k"), arg("v"), arg("bf16"), arg("cosine"), arg("sine"), arg("scale"), arg("M"), arg("heads"),
        arg("key_heads"), arg("dim"), arg("out"), arg("log_sum"), arg("workspace"), arg("threads"),
        "Causal attention of one sequence, q and k turned by the rotary embedding.");
    module.def(
        "attention_backward",
        [](uintptr_t q, uintptr_t k, uintptr_t v, bool bf16, uintptr_t cosine, uintptr_t sine, float scale,
           int64_t tokens, int64_t heads, int64_t key_heads, int64_t dim, uintptr_t out, uintptr_t log_sum,
           uintptr_t workspace, uintptr_t grad, uintptr_t grad_q, uintptr_t grad_k, uintptr_t grad_v, int threads) {
            const AttentionForward a = attention(q, k, v, bf16, cosine, sine, scale,
                                                 shape_of(tokens, heads, key_heads, dim), out, log_sum, workspace);
            const AttentionBackward b = {a, floats(grad, "grad", bf16), floats(grad_q, "grad_q", bf16),
                                         floats(grad_k, "grad_k", bf16), floats(grad_v, "grad_v", bf16)};
            py::gil_scoped_release release;
            attention_backward(b, threads);
        },
        arg("q"), arg("k"), arg("v"), arg("bf16"), arg("cosine"), arg("sine"), arg("scale"), arg("M"), arg("heads"),
        arg("key_heads"), arg("dim"), arg("out"), arg("log_sum"), arg("workspace"), arg("grad"), arg("grad_q"),
        arg("grad_k"), arg("grad_v"), arg("threads"), "Its gradients, before the rotary embedding.");
    module.def(
        "norm_forward",
        [](int64_t rows, int64_t width, bool bf16, float eps, uintptr_t x, uintptr_t delta, uintptr_t weight,
           uintptr_t sum, uintptr_t out, uintptr_t rate, int threads) {
            positive(rows, "M");
            positive(width, "K");
            const NormForward n = {rows,
                                   width,
                                   bf16,
                                   eps,
                                   address<const float>(x, "x"),
                                   maybe(delta, "delta", bf16),
                                   address<const float>(weight, "weight"),
                                   delta ? address<float>(sum, "sum") : nullptr,
                                   floats(out, "out", bf16),
                                   address<float>(rate, "rate")};
            py::gil_scoped_release release;
            norm_forward(n, threads);
        },
        arg("M"), arg("K"), arg("bf16"), arg("eps"), arg("x"), arg("delta"), arg("weight"), arg("sum"), arg("out"),
        arg("rate"), arg("threads"), "sum = x + delta and its RMS norm.");
    module.def(
        "norm_backward",
        [](int64_t rows, int64_t width, bool bf16, uintptr_t grad, uintptr_t grad_sum, uintptr_t sum, uintptr_t weight,
           uintptr_t rate, uintptr_t grad_x, uintptr_t grad_delta, int threads) {
            positive(rows, "M");
            positive(width, "K");
            const NormBackward n = {rows,
                                    width,
                                    bf16,
                                    floats(grad, "grad", bf16),
                                    static_cast<float*>(maybe(grad_sum, "grad_sum", false)),
                                    address<const float>(sum, "sum"),
                                    address<const float>(weight, "weight"),
                                    address<const float>(rate, "rate"),
                                    address<float>(grad_x, "grad_x"),
                                    maybe(grad_delta, "grad_delta", bf16)};
            py::gil_scoped_release release;
            norm_backward(n, threads);
        },
        arg("M"), arg("K"), arg("bf16"), arg("grad"), arg("grad_sum"), arg("sum"), arg("weight"), arg("rate"),
        arg("grad_x"), arg("grad_delta"), arg("threads"), "Gradients to x and delta of norm_forward.");
    module.def(
        "gated_forward",
        [](int64_t count, bool bf16, uintptr_t gate, uintptr_t up, uintptr_t out, int threads) {
            positive(count, "count");
            const GatedForward g = {count, bf16, floats(gate, "gate", bf16), floats(up, "up", bf16),
                                    floats(out, "out", bf16)};
            py::gil_scoped_release release;
            gated_forward(g, threads);
        },
        arg("count"), arg("bf16"), arg("gate"), arg("up"), arg("out"), arg("threads"), "out = silu(gate) * up.");
    module.def(
        "gated_backward",
        [](int64_t count, bool bf16, uintptr_t grad, uintptr_t gate, uintptr_t up, uintptr_t grad_gate,
           uintptr_t grad_up, int threads) {
            positive(count, "count");
            const GatedBackward g = {count,
                                     bf16,
                                     floats(grad, "grad", bf16),
                                     floats(gate, "gate", bf16),
                                     floats(up, "up", bf16),
                                     floats(grad_gate, "grad_gate", bf16),
                                     floats(grad_up, "grad_up", bf16)};
            py::gil_scoped_release release;
            gated_backward(g, threads);
        },
        arg("count"), arg("bf16"), arg("grad"), arg("gate"), arg("up"), arg("grad_gate"), arg("grad_up"),
        arg("threads"), "Its gradients.");
}

}  // namespace dq::binding

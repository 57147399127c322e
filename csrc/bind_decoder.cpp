// The native decoder from Python: addresses in, logits out. dq_runtime/runtime/decoder/native_decoder.py owns the bytes.

#include <memory>
#include <utility>

#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/decoder.h"

namespace dq::binding {
namespace {

const float* floats(const py::dict& from, const char* name) {
    return address<const float>(from[name].cast<uintptr_t>(), name);
}
const float* floats_or_null(const py::dict& from, const char* name) {
    return from[name].cast<uintptr_t>() == 0 ? nullptr : floats(from, name);
}
DecoderLinear linear(const py::handle& pair) {
    const auto both = pair.cast<std::pair<Prepared, uintptr_t>>();
    return {both.first, reinterpret_cast<const float*>(both.second)};
}

void expect(const char* name, const DecoderLinear& linear, int64_t n, int64_t k) {
    if (linear.w.n == n && linear.w.k == k) return;
    throw py::value_error(std::string(name) + " is [" + std::to_string(linear.w.n) + ", " + std::to_string(linear.w.k) +
                          "], expected [" + std::to_string(n) + ", " + std::to_string(k) + "]");
}

std::unique_ptr<Decoder> make_decoder(const py::dict& c) {
    DecoderModel m{};
    m.hidden = c["hidden"].cast<int64_t>();
    m.heads = c["heads"].cast<int64_t>();
    m.kv_heads = c["kv_heads"].cast<int64_t>();
    m.head_dim = c["head_dim"].cast<int64_t>();
    m.intermediate = c["intermediate"].cast<int64_t>();
    m.vocab = c["vocab"].cast<int64_t>();
    for (const int64_t size : {m.hidden, m.heads, m.kv_heads, m.head_dim, m.intermediate, m.vocab}) {
        positive(size, "every size of the model");
    }
    if (m.head_dim % 16 != 0 || m.heads % m.kv_heads != 0) {
        throw py::value_error("head_dim must be a multiple of 16, heads a multiple of kv_heads");
    }
    m.eps = c["eps"].cast<float>();
    m.attention_scale = c["attention_scale"].cast<float>();
    m.attention_softcap = c["attention_softcap"].cast<float>();
    m.logit_softcap = c["logit_softcap"].cast<float>();
    m.embedding_scale = c["embedding_scale"].cast<float>();
    m.gelu = c["gelu"].cast<bool>();
    m.exact = c["exact"].cast<bool>();
    m.embedding_type = static_cast<FloatType>(c["embedding_type"].cast<int>());
    m.embedding = address<const void>(c["embedding"].cast<uintptr_t>(), "embedding", 2);
    m.norm = floats(c, "norm");
    m.head = linear(c["head"]);
    expect("head", m.head, m.vocab, m.hidden);
    m.rope_dims = c["rope_dims"].cast<std::vector<int64_t>>();
    m.rope_factors = c["rope_factors"].cast<std::vector<float>>();
    const int64_t gate_rows = (m.intermediate + kRows - 1) / kRows * kRows;
    for (const py::handle& item : c["layers"].cast<py::list>()) {
        const py::dict l = item.cast<py::dict>();
        DecoderLayer layer{floats(l, "attention_norm"), floats_or_null(l, "after_attention_norm"),
                           floats(l, "mlp_norm"),       floats_or_null(l, "after_mlp_norm"),
                           floats_or_null(l, "q_norm"), floats_or_null(l, "k_norm"),
                           linear(l["qkv"]),            linear(l["o"]),
                           linear(l["gate_up"]),        linear(l["down"]),
                           l["window"].cast<int64_t>(), l["rope"].cast<int64_t>()};
        expect("qkv", layer.qkv, (m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden);
        expect("o", layer.o, m.hidden, m.heads * m.head_dim);
        expect("gate_up", layer.gate_up, 2 * gate_rows, m.hidden);
        expect("down", layer.down, m.hidden, m.intermediate);
        if (layer.rope < 0 || layer.rope >= static_cast<int64_t>(m.rope_dims.size())) {
            throw py::value_error("rope is no index into rope_dims");
        }
        m.layers.push_back(layer);
    }
    if (m.layers.empty() || m.rope_factors.size() != m.rope_dims.size()) {
        throw py::value_error("a decoder needs layers, and a factor for every rope");
    }
    try {
        return std::make_unique<Decoder>(std::move(m));
    } catch (const std::runtime_error& e) {
        throw py::value_error(e.what());
    }
}

void step(Decoder& decoder, uintptr_t tokens, uintptr_t positions, int64_t batch, int64_t count, uintptr_t cache,
          int64_t capacity, uintptr_t frequencies, uintptr_t logits, bool every_token, int threads) {
    positive(batch, "batch");
    positive(count, "count");
    positive(capacity, "capacity");
    if (count > 1 && batch * count > kChunk) {
        throw py::value_error("at most " + std::to_string(kChunk) + " tokens a step, got " + std::to_string(batch * count));
    }
    Decoder::Step s{};
    s.tokens = address<const int64_t>(tokens, "tokens");
    s.positions = address<const int64_t>(positions, "positions");
    s.batch = batch;
    s.count = count;
    s.cache = address<void>(cache, "cache", 64);
    s.capacity = capacity;
    s.frequencies = address<const float>(frequencies, "frequencies");
    s.logits = address<float>(logits, "logits");
    s.every_token = every_token;
    s.threads = threads < 1 ? 1 : threads > 255 ? 255 : threads;
    for (int64_t b = 0; b < batch; ++b) {
        if (s.positions[b] < 0 || s.positions[b] + count > capacity) {
            throw py::value_error("sequence " + std::to_string(b) + " would exceed the capacity of " +
                                  std::to_string(capacity));
        }
    }
    for (int64_t i = 0; i < batch * count; ++i) {
        if (s.tokens[i] < 0 || s.tokens[i] >= decoder.vocab()) {
            throw py::value_error("token id " + std::to_string(s.tokens[i]) + " is outside the vocabulary");
        }
    }
    py::gil_scoped_release release;
    decoder.run(s);
}

}  // namespace

void bind_decoder(py::module_& module) {
    using py::arg;
    py::class_<Decoder>(module, "Decoder", "A model as one native object; see csrc/cpu/decoder.h.")
        .def(py::init(&make_decoder), arg("model"))
        .def("cache_bytes", &Decoder::cache_bytes, arg("batch"), arg("capacity"))
        .def("step", &step, arg("tokens"), arg("positions"), arg("batch"), arg("count"), arg("cache"), arg("capacity"),
             arg("frequencies"), arg("logits"), arg("every_token"), arg("threads"));
    module.attr("CHUNK") = kChunk;
}

}  // namespace dq::binding

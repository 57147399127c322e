// The native decoder from Python: addresses in, logits out. dq_runtime/runtime/decoder/native_decoder.py owns the bytes.

#include <memory>
#include <utility>

#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/decoder.h"
#include "cpu/pool.h"

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

void check_ids(const int64_t* tokens, int64_t count, int64_t vocab) {
    for (int64_t i = 0; i < count; ++i) {
        if (tokens[i] < 0 || tokens[i] >= vocab) {
            throw py::value_error("token id " + std::to_string(tokens[i]) + " is outside the vocabulary");
        }
    }
}
int allowed_threads(int threads) { return threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads; }

void step(Decoder& decoder, uintptr_t tokens, uintptr_t positions, int64_t batch, int64_t count, uintptr_t cache,
          int64_t capacity, uintptr_t frequencies, uintptr_t logits, bool generated, bool every_token, int threads) {
    positive(batch, "batch");
    positive(count, "count");
    positive(capacity, "capacity");
    if (count > 1 && (generated || batch * count > kChunk)) {
        throw py::value_error("at most " + std::to_string(kChunk) + " tokens a step and one generated of a sequence, got " +
                              std::to_string(batch * count));
    }
    const int64_t* held = address<const int64_t>(positions, "positions");
    std::vector<Segment> segments;
    for (int64_t b = 0; b < batch; ++b) {
        if (held[b] < 0 || held[b] + count > capacity) {
            throw py::value_error("sequence " + std::to_string(b) + " would exceed the capacity of " +
                                  std::to_string(capacity));
        }
        segments.push_back({count, held[b], every_token ? count : 1, generated, nullptr, 0});
    }
    const Layout layout = decoder.rings(batch, capacity);
    const Decoder::Step s{address<const int64_t>(tokens, "tokens"),
                          address<void>(cache, "cache", 64),
                          layout,
                          address<const float>(frequencies, "frequencies"),
                          address<float>(logits, "logits"),
                          allowed_threads(threads)};
    check_ids(s.tokens, batch * count, decoder.vocab());
    py::gil_scoped_release release;
    decoder.run(std::move(segments), s);
}

// Which segment writes a block, and that nobody else touches it.
class Writers {
public:
    explicit Writers(int64_t blocks) : writer_(static_cast<size_t>(blocks), -1) {}

    void claim(int64_t block, int64_t segment) {
        if (writer_[static_cast<size_t>(block)] >= 0) refuse(block, segment);
        writer_[static_cast<size_t>(block)] = segment;
    }
    void check_reader(int64_t block, int64_t segment) const {
        if (writer_[static_cast<size_t>(block)] >= 0) refuse(block, segment);
    }

private:
    void refuse(int64_t block, int64_t segment) const {
        throw py::value_error("segment " + std::to_string(segment) + " uses block " + std::to_string(block) +
                              ", which segment " + std::to_string(writer_[static_cast<size_t>(block)]) +
                              " writes: a block being written belongs to one place of one sequence");
    }
    std::vector<int64_t> writer_;
};

// [count, 5]: tokens, position, whether the last logits are wanted, whether it is generated, entries of the table.
std::vector<Segment> segments_of(const int64_t* rows, int64_t count, const int64_t* tables, int64_t blocks,
                                 int64_t positions) {
    std::vector<Segment> segments;
    int64_t tokens = 0;
    for (int64_t i = 0; i < count; ++i, rows += 5) {
        const Segment s{rows[0], rows[1], rows[2] != 0, rows[3] != 0, tables, rows[4]};
        const std::string name = "segment " + std::to_string(i);
        if (s.count < 1 || s.count > kChunk || (s.generated && s.count != 1)) {
            throw py::value_error(name + " has " + std::to_string(s.count) + " tokens; allowed are 1 to " +
                                  std::to_string(kChunk) + ", and 1 where it is generated");
        }
        tokens += s.count;
        if (s.position < 0 || s.position > positions - s.count) {
            throw py::value_error(name + " would have tokens " + std::to_string(s.position) + " to " +
                                  std::to_string(s.position + s.count - 1) + " of a sequence of at most " +
                                  std::to_string(positions));
        }
        const int64_t needed = (s.position + s.count + kScoreTile - 1) / kScoreTile;
        if (s.tiles < needed) {
            throw py::value_error(name + " needs " + std::to_string(needed) + " blocks for " +
                                  std::to_string(s.position + s.count) + " positions, its table has " +
                                  std::to_string(s.tiles));
        }
        for (int64_t t = 0; t < s.tiles; ++t) {
            if (tables[t] < 0 || tables[t] >= blocks) {
                throw py::value_error(name + " names block " + std::to_string(tables[t]) + " of a memory of " +
                                      std::to_string(blocks));
            }
        }
        tables += s.tiles;
        segments.push_back(s);
    }
    if (tokens > kChunk) {
        throw py::value_error("at most " + std::to_string(kChunk) + " tokens a pass, got " + std::to_string(tokens));
    }
    Writers writers(blocks);
    for (int64_t i = 0; i < count; ++i) {
        const Segment& s = segments[static_cast<size_t>(i)];
        const int64_t last = (s.position + s.count - 1) / kScoreTile;
        for (int64_t t = s.position / kScoreTile; t <= last; ++t) writers.claim(s.blocks[t], i);
    }
    for (int64_t i = 0; i < count; ++i) {
        const Segment& s = segments[static_cast<size_t>(i)];
        for (int64_t t = 0; t < s.position / kScoreTile; ++t) writers.check_reader(s.blocks[t], i);
    }
    return segments;
}

void run(Decoder& decoder, uintptr_t tokens, uintptr_t rows, int64_t count, uintptr_t tables, uintptr_t memory,
         int64_t blocks, int64_t positions, uintptr_t frequencies, uintptr_t logits, int threads) {
    positive(count, "the number of segments");
    positive(blocks, "blocks");
    positive(positions, "positions");
    std::vector<Segment> segments = segments_of(address<const int64_t>(rows, "segments"), count,
                                                address<const int64_t>(tables, "tables"), blocks, positions);
    const Layout layout = decoder.blocks();
    const Decoder::Step s{address<const int64_t>(tokens, "tokens"),
                          address<void>(memory, "memory", 64),
                          layout,
                          address<const float>(frequencies, "frequencies"),
                          address<float>(logits, "logits"),
                          allowed_threads(threads)};
    int64_t all = 0;
    for (const Segment& segment : segments) all += segment.count;
    check_ids(s.tokens, all, decoder.vocab());
    py::gil_scoped_release release;
    decoder.run(std::move(segments), s);
}

}  // namespace

void bind_decoder(py::module_& module) {
    using py::arg;
    py::class_<Decoder>(module, "Decoder", "A model as one native object; see csrc/cpu/decoder.h.")
        .def(py::init(&make_decoder), arg("model"))
        .def("cache_bytes", [](const Decoder& d, int64_t batch, int64_t capacity) { return d.rings(batch, capacity).bytes; },
             arg("batch"), arg("capacity"))
        .def("step", &step, arg("tokens"), arg("positions"), arg("batch"), arg("count"), arg("cache"), arg("capacity"),
             arg("frequencies"), arg("logits"), arg("generated"), arg("every_token"), arg("threads"))
        .def("block_bytes", [](const Decoder& d) { return d.blocks().bytes; })
        .def("run", &run, arg("tokens"), arg("segments"), arg("count"), arg("tables"), arg("memory"), arg("blocks"),
             arg("positions"), arg("frequencies"), arg("logits"), arg("threads"));
    module.attr("CHUNK") = kChunk;
    module.attr("TILE") = kScoreTile;
}

}  // namespace dq::binding

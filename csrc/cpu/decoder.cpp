#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "pool.h"
#include "vec.h"

namespace dq {
namespace {

// Tokens from which a matmul with too few rows for all threads is cut along the tokens too.
constexpr int64_t kTokenCut = 64;

// Pieces of the rows of one token that are refined, for the threads to share.
constexpr int64_t kRefineCuts = 8;

template <typename T>
T* aligned(std::vector<unsigned char>& bytes, int64_t offset) {
    const uintptr_t base = (reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64;
    return reinterpret_cast<T*>(base + static_cast<uintptr_t>(offset));
}

}  // namespace

// One step: which phases there are, how many units each has, and what a unit does. A layer is ten phases; the sum of a
// residual branch is added by the phase that next normalises x, so that a matmul only ever stores.
struct Decoder::Phases {
    enum Kind { kNormIn, kQkv, kRotate, kAttend, kMixed, kO, kNormMid, kGateUp, kQuantize, kDown, kPerLayer };

    Decoder& d;
    const DecoderModel& m;
    const Kernels& k;
    const Step& step;
    const Pass& pass;
    int64_t tokens, wanted;  // wanted: those whose logits are asked for

    int layers() const { return static_cast<int>(m.layers.size()); }
    // Those after the layers.
    enum Last { kFinalNorm, kHead, kChoose, kRefine, kCap, kLast };
    int phases() const { return 1 + kPerLayer * layers() + kLast; }
    int64_t units_of_last(int last) const {
        switch (last) {
            case kHead: return matmul_units(m.head, wanted, false);
            case kChoose: return m.head.w.rest ? wanted : 0;
            case kRefine: return m.head.w.rest ? wanted * kRefineCuts : 0;
            case kCap: return m.logit_softcap > 0.0f ? wanted : 0;
            default: return wanted;
        }
    }

    int64_t heads_per_kv() const { return m.heads / m.kv_heads; }
    int64_t qkv_stride() const { return m.layers[0].qkv.w.blocks() * kRows; }
    int64_t mixed_stride() const { return m.heads * m.head_dim; }
    int64_t gate_stride() const { return round_up(m.intermediate, kRows); }

    // What is done token by token takes a microsecond each: of few tokens every thread has one share.
    int64_t token_units() const { return tokens <= kFewTokens ? std::min<int64_t>(tokens, step.threads) : tokens; }

    int64_t units(int phase) const {
        if (phase == 0) return token_units();
        const int in_layers = phase - 1;
        if (in_layers >= kPerLayer * layers()) {
            return units_of_last(in_layers - kPerLayer * layers());
        }
        const DecoderLayer& layer = m.layers[static_cast<size_t>(in_layers / kPerLayer)];
        switch (in_layers % kPerLayer) {
            case kQkv: return matmul_units(layer.qkv, tokens, false);
            case kO: return matmul_units(layer.o, tokens, false);
            case kGateUp: return matmul_units(layer.gate_up, tokens, true);
            case kDown: return matmul_units(layer.down, tokens, false);
            case kAttend: return static_cast<int64_t>(pass.items.size()) * m.kv_heads;
            default: return token_units();
        }
    }

    void work(int phase, int64_t begin, int64_t end, int thread) {
        const int64_t shares = token_units(), first = tokens * begin / shares, last = tokens * end / shares;
        if (phase == 0) return embed(first, last);
        const int in_layers = phase - 1;
        if (in_layers >= kPerLayer * layers()) {
            switch (in_layers - kPerLayer * layers()) {
                case kFinalNorm: return final_norm(begin, end);
                case kHead: {
                    const Output out{step.logits, m.vocab, m.vocab, m.head.bias, Epilogue::kStore};
                    return matmul(m.head, out, wanted, begin, end, thread);
                }
                case kChoose: return choose(begin, end);
                case kRefine: return refine(begin, end);
                default: return cap_logits(begin, end);
            }
        }
        const size_t index = static_cast<size_t>(in_layers / kPerLayer);
        const DecoderLayer& layer = m.layers[index];
        float* y = d.y_.data();
        switch (in_layers % kPerLayer) {
            case kNormIn: {
                const float* after = index ? m.layers[index - 1].after_mlp_norm : nullptr;
                return norm(index > 0, after, layer.attention_norm, layer.qkv, first, last);
            }
            case kQkv: return matmul(layer.qkv, store_to(d.wide_.data(), qkv_stride(), layer.qkv), tokens, begin, end, thread);
            case kRotate: return rotate(layer, index, first, last);
            case kAttend: return attend(layer, index, begin, end, thread);
            case kMixed: return mixed(layer, first, last);
            case kO: return matmul(layer.o, store_to(y, m.hidden, layer.o), tokens, begin, end, thread);
            case kNormMid: return norm(true, layer.after_attention_norm, layer.mlp_norm, layer.gate_up, first, last);
            case kGateUp: {
                Output out{d.wide_.data(), gate_stride(), gate_stride(), layer.gate_up.bias, Epilogue::kSiluMul};
                if (m.gelu) out.epilogue = Epilogue::kGeluMul;
                return matmul(layer.gate_up, out, tokens, begin, end, thread);
            }
            case kQuantize: return feed(layer.down, d.wide_.data(), gate_stride(), first, last);
            default: return matmul(layer.down, store_to(y, m.hidden, layer.down), tokens, begin, end, thread);
        }
    }

    static Output store_to(float* y, int64_t stride, const DecoderLinear& linear) {
        return {y, stride, linear.w.n, linear.bias, Epilogue::kStore};
    }

    // A unit of a matmul: one block (or pair) of few tokens; two blocks of many, cut along the tokens where the rows
    // alone do not occupy every thread.
    int64_t token_cuts(int64_t tiles, int64_t rows) const {
        const int64_t wanted_units = 4 * step.threads;
        if (step.threads == 1 || tiles >= wanted_units || rows < 2 * kTokenCut) return 1;
        return std::min(rows / kTokenCut, (wanted_units + tiles - 1) / tiles);
    }
    int64_t matmul_units(const DecoderLinear& linear, int64_t rows, bool paired) const {
        if (rows == 0) return 0;
        if (rows <= kFewTokens) return linear.w.blocks() / (paired ? 2 : 1);
        const int64_t tiles = (linear.w.blocks() + 1) / 2;
        return tiles * token_cuts(tiles, rows);
    }
    void matmul(const DecoderLinear& linear, const Output& out, int64_t rows, int64_t begin, int64_t end, int thread) {
        const auto kernel = m.exact ? k.matmul_exact : k.matmul_int8;
        const Activations a = activations(linear.w);
        void* scratch = aligned<void>(d.scratch_, thread * d.scratch_stride_);
        if (rows <= kFewTokens) {
            const int64_t blocks = out.epilogue == Epilogue::kStore ? 1 : 2;
            return kernel(linear.w, a, out, {0, rows, begin * blocks, end * blocks, scratch});
        }
        const int64_t blocks = linear.w.blocks(), cuts = token_cuts((blocks + 1) / 2, rows);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t block = unit / cuts * 2, cut = unit % cuts;
            kernel(linear.w, a, out,
                   {rows * cut / cuts, rows * (cut + 1) / cuts, block, std::min(block + 2, blocks), scratch});
        }
    }

    // The one buffer of activations, laid out for the weight that reads it next.
    Activations activations(const Prepared& w) const {
        Activations a;
        place_activations(w, tokens, m.exact, aligned<unsigned char>(d.activations_, 0), &a);
        return a;
    }
    void feed(const DecoderLinear& next, const float* x, int64_t stride, int64_t begin, int64_t end) {
        const Activations a = activations(next.w);
        if (m.exact) return k.pad(next.w, x, stride, a, begin, end);
        for (int64_t row = begin; row < end; ++row) {
            // Before the head, prompts are few rows or an evaluation: full precision. Of many texts that are being generated
            // its products were a quarter of a pass of eight, half of them the rests'.
            const bool head = &next == &m.head;
            const int64_t token = head ? pass.rows[static_cast<size_t>(row)] : row;
            const bool prompt = !pass.segment_of(token).generated;
            if (prompt && !head && k.round != nullptr) {
                k.round(next.w, x, stride, a, row, row + 1);
            } else {
                k.quantize(next.w, x, stride, pass.all_fine(token) || (head && prompt), a, row, row + 1);
            }
        }
    }

    void embed(int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t row = step.tokens[token] * m.hidden;
            float* x = d.x_.data() + token * m.hidden;
            for (int64_t i = 0; i < m.hidden; ++i) {
                float value;
                if (m.embedding_type == FloatType::kFloat32) {
                    value = static_cast<const float*>(m.embedding)[row + i];
                } else {
                    const uint16_t bits = static_cast<const uint16_t*>(m.embedding)[row + i];
                    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
                    std::memcpy(&value, &wide, 4);
                    if (m.embedding_type == FloatType::kFloat16) value = float_of_half(bits);
                }
                x[i] = value * m.embedding_scale;
            }
            angles(token);
        }
    }

    // cos and sin of every rope at the token's position, [rope][cos dim / 2, sin dim / 2]. The angle is rounded to
    // float32 before its sine is taken, as everybody does.
    int64_t rotation_stride() const {
        int64_t total = 0;
        for (const int64_t dim : m.rope_dims) total += dim;
        return total;
    }
    void angles(int64_t token) {
        float* to = d.rotation_.data() + token * rotation_stride();
        const float* frequency = step.frequencies;
        const float position = static_cast<float>(pass.position[static_cast<size_t>(token)]);
        for (size_t rope = 0; rope < m.rope_dims.size(); ++rope) {
            const int64_t half = m.rope_dims[rope] / 2;
            for (int64_t i = 0; i < half; ++i) {
                const float angle = position * frequency[i];
                to[i] = std::cos(angle) * m.rope_factors[rope];
                to[half + i] = std::sin(angle) * m.rope_factors[rope];
            }
            to += 2 * half;
            frequency += half;
        }
    }

    // x += y (normalised by `after` where there is one), then the normalised x as the activations of `next`.
    void norm(bool add_y, const float* after, const float* weight, const DecoderLinear& next, int64_t begin,
              int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            float* x = d.x_.data() + token * m.hidden;
            float* normed = d.norm_.data() + token * m.hidden;
            if (add_y) {
                float* y = d.y_.data() + token * m.hidden;
                if (after != nullptr) k.rms_norm(y, after, y, m.hidden, m.eps);
                k.add(x, y, m.hidden);
            }
            k.rms_norm(x, weight, normed, m.hidden, m.eps);
        }
        feed(next, d.norm_.data(), m.hidden, begin, end);
    }

    KeyValue cache_of(size_t layer, int64_t segment, int64_t head) const {
        const Layout::Place& place = step.layout.places[layer];
        const Segment& s = pass.segments[static_cast<size_t>(segment)];
        auto* base = static_cast<unsigned char*>(step.memory) + place.offset + head * d.head_tile_bytes();
        const int64_t* blocks = place.ring ? step.layout.in_order.data() + segment * place.ring : s.blocks;
        return {base, place.stride, blocks, place.ring ? place.ring : s.tiles, m.head_dim, !m.exact};
    }

    void rotate(const DecoderLayer& layer, size_t index, int64_t begin, int64_t end) {
        const int64_t dim = m.head_dim;
        int64_t offset = 0;
        for (int64_t r = 0; r < layer.rope; ++r) offset += m.rope_dims[static_cast<size_t>(r)];
        const int64_t half = m.rope_dims[static_cast<size_t>(layer.rope)] / 2;
        for (int64_t token = begin; token < end; ++token) {
            float* row = d.wide_.data() + token * qkv_stride();
            const float* cosine = d.rotation_.data() + token * rotation_stride() + offset;
            for (int64_t head = 0; head < m.heads + m.kv_heads; ++head) {
                float* x = row + head * dim;
                const float* weight = head < m.heads ? layer.q_norm : layer.k_norm;
                if (weight != nullptr) k.rms_norm(x, weight, x, dim, m.eps);
                k.rope(x, cosine, cosine + half, half);
                if (head >= m.heads) continue;
                for (int64_t i = 0; i < dim; ++i) x[i] *= m.attention_scale;
            }
            const float* key = row + m.heads * dim;
            const float* value = key + m.kv_heads * dim;
            for (int64_t head = 0; head < m.kv_heads; ++head) {
                const size_t t = static_cast<size_t>(token);
                k.store_key_value(key + head * dim, value + head * dim, cache_of(index, pass.owner[t], head),
                                  pass.position[t]);
            }
        }
    }

    void attend(const DecoderLayer& layer, size_t index, int64_t begin, int64_t end, int thread) {
        const int64_t group = heads_per_kv(), dim = m.head_dim;
        for (int64_t unit = begin; unit < end; ++unit) {
            const AttendItem& item = pass.items[static_cast<size_t>(unit / m.kv_heads)];
            const int64_t head = unit % m.kv_heads;
            AttendUnit u{};
            u.q = d.wide_.data() + item.token * qkv_stride() + head * group * dim;
            u.token_stride = qkv_stride();
            u.tokens = item.tokens;
            u.heads = group;
            u.position = pass.position[static_cast<size_t>(item.token)];
            u.window = layer.window;
            u.begin = item.begin;
            u.end = item.end;
            // By what the token is, not by how many there are: it decides in which order a softmax is summed.
            u.span = pass.segment_of(item.token).generated && group <= kFewRows ? kWideSpan : kScoreTile;
            u.softcap = m.attention_softcap;
            u.cache = cache_of(index, item.segment, head);
            u.normalise = item.part < 0;
            if (item.part < 0) {
                u.out = d.norm_.data() + item.token * mixed_stride() + head * group * dim;
                u.out_stride = mixed_stride();
            } else {
                const int64_t at = item.part * m.heads + head * group;
                u.out = d.partial_.data() + at * dim;
                u.top = d.statistic_.data() + at;
                u.total = d.statistic_.data() + pass.parts() * m.heads + at;
            }
            u.scratch = aligned<float>(d.scratch_, thread * d.scratch_stride_);
            k.attend(u);
        }
    }

    // Joins the partial results of split tokens, and hands the heads to the output projection.
    void mixed(const DecoderLayer& layer, int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const size_t segment = static_cast<size_t>(pass.owner[static_cast<size_t>(token)]);
            const int64_t first = pass.first_part[segment], parts = pass.first_part[segment + 1] - first;
            for (int64_t head = 0; parts > 0 && head < m.heads; ++head) join(token, head, first, parts);
        }
        feed(layer.o, d.norm_.data(), mixed_stride(), begin, end);
    }
    void join(int64_t token, int64_t head, int64_t first, int64_t parts) {
        const float* tops = d.statistic_.data() + first * m.heads + head;
        const float* totals = tops + pass.parts() * m.heads;
        float top = -INFINITY, total = 0.0f;
        for (int64_t s = 0; s < parts; ++s) top = std::max(top, tops[s * m.heads]);
        float* out = d.norm_.data() + token * mixed_stride() + head * m.head_dim;
        std::memset(out, 0, static_cast<size_t>(m.head_dim) * sizeof(float));
        for (int64_t s = 0; s < parts; ++s) {
            const float factor = std::exp(tops[s * m.heads] - top);
            total += factor * totals[s * m.heads];
            const float* part = d.partial_.data() + ((first + s) * m.heads + head) * m.head_dim;
            for (int64_t i = 0; i < m.head_dim; ++i) out[i] += factor * part[i];
        }
        for (int64_t i = 0; i < m.head_dim; ++i) out[i] /= total;
    }

    void final_norm(int64_t begin, int64_t end) {
        const float* after = m.layers.back().after_mlp_norm;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t token = pass.rows[static_cast<size_t>(i)];
            float* x = d.x_.data() + token * m.hidden;
            float* y = d.y_.data() + token * m.hidden;
            if (after != nullptr) k.rms_norm(y, after, y, m.hidden, m.eps);
            k.add(x, y, m.hidden);
            k.rms_norm(x, m.norm, d.norm_.data() + i * m.hidden, m.hidden, m.eps);
        }
        feed(m.head, d.norm_.data(), m.hidden, begin, end);
    }

    void choose(int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float* logits = step.logits + i * m.vocab;
            d.chosen_count_[static_cast<size_t>(i)] = k.choose(logits, m.vocab, d.chosen_.data() + i * d.chosen_stride());
        }
    }
    void refine(int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t i = unit / kRefineCuts, cut = unit % kRefineCuts;
            const int64_t count = d.chosen_count_[static_cast<size_t>(i)];
            const int64_t first = count * cut / kRefineCuts, last = count * (cut + 1) / kRefineCuts;
            const int32_t* rows = d.chosen_.data() + i * d.chosen_stride() + first;
            k.refine(m.head.w, d.norm_.data() + i * m.hidden, rows, last - first, step.logits + i * m.vocab);
        }
    }

    void cap_logits(int64_t begin, int64_t end) {
        for (int64_t i = begin * m.vocab; i < end * m.vocab; ++i) {
            step.logits[i] = m.logit_softcap * std::tanh(step.logits[i] / m.logit_softcap);
        }
    }
};

void Decoder::run(std::vector<Segment> segments, const Step& step) {
    pass_.segments = std::move(segments);
    pass_.plan(std::max<int64_t>(1, kAttendRows / (model_.heads / model_.kv_heads)));
    reserve(step.threads);
    Phases phases{*this, model_, kernels_, step, pass_, pass_.tokens(), pass_.wanted()};
    run_job({phases.phases(), [](void* p, int phase) { return static_cast<Phases*>(p)->units(phase); },
             [](void* p, int phase, int64_t begin, int64_t end, int thread) {
                 static_cast<Phases*>(p)->work(phase, begin, end, thread);
             },
             &phases},
            step.threads);
}

}  // namespace dq

// A decoder of the Llama family as one job of the pool: a whole step, embedding to logits, without leaving C++.
// What it computes is said in dq_runtime/runtime/decoder/architecture.py; activations are float32 throughout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "pass.h"
#include "prepared.h"
#include "repack.h"

namespace dq {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct DecoderLinear {
    Prepared w;
    const float* bias;  // [blocks * 16] or nullptr
};

// Norms are float32 [hidden], Gemma's one already added. gate_up alternates blocks of 16 rows of gate and of up.
struct DecoderLayer {
    const float *attention_norm, *after_attention_norm, *mlp_norm, *after_mlp_norm;  // the `after` ones may be null
    const float *q_norm, *k_norm;                                                    // [head_dim] or null
    DecoderLinear qkv, o, gate_up, down;
    int64_t window;  // 0: none
    int64_t rope;    // which of the cache's frequency tables
};

struct DecoderModel {
    int64_t hidden, heads, kv_heads, head_dim, intermediate, vocab;
    float eps, attention_scale, attention_softcap, logit_softcap, embedding_scale;  // softcaps: 0 is off
    bool gelu;                                                                      // else silu
    bool exact;  // float32 activations and cache instead of int8 and float16
    const void* embedding;  // [vocab, hidden]
    FloatType embedding_type;
    const float* norm;
    DecoderLinear head;
    std::vector<DecoderLayer> layers;
    std::vector<int64_t> rope_dims;     // rotated values of a head, by rope
    std::vector<float> rope_factors;    // what cos and sin are multiplied by
};

// Most tokens of one pass: bounds activations and what the ring of a sliding window must hold beyond the window.
constexpr int64_t kChunk = 512;

// Where the tiles of 64 positions lie in the memory of keys and values. It must be zero at first, 64-byte aligned.
struct Layout {
    // Of one layer: tile t is at offset + t * stride. A sequence's tiles are those its table names; with rings they are
    // `ring` tiles of its own, used again from the first on when a window has left them behind (0: no ring).
    struct Place {
        int64_t offset, stride, ring;
    };
    std::vector<Place> places;
    std::vector<int64_t> in_order;  // 0, 1, 2 ..: the table of the first sequence's ring, the others' follow
    int64_t bytes;                  // of all sequences with rings, of one block without
};

class Decoder {
public:
    explicit Decoder(DecoderModel model);

    // `batch` sequences of up to `capacity` positions each; layers with a sliding window keep only what it can see.
    Layout rings(int64_t batch, int64_t capacity) const;
    // Blocks of 64 positions of all layers; windows save nothing here.
    Layout blocks() const;

    struct Step {
        const int64_t* tokens;  // ids, segment after segment
        void* memory;
        const Layout& layout;
        const float* frequencies;  // radians per position, the ropes' tables one after the other, dim / 2 each
        float* logits;             // [wanted tokens, vocab]
        int threads;
    };
    // What the caller has checked: ids, positions within rings or tables, tables within the memory. At most kChunk
    // tokens, or one of each segment. Not by two threads at a time.
    void run(std::vector<Segment> segments, const Step& step);
    int64_t vocab() const { return model_.vocab; }

private:
    struct Phases;
    friend struct Phases;

    int64_t head_tile_bytes() const;
    int64_t chosen_stride() const { return most_refined(model_.vocab) + 1; }
    void reserve(int threads);  // workspaces for pass_

    DecoderModel model_;
    const Kernels& kernels_;
    int64_t widest_;  // floats of the widest intermediate row
    // Workspaces, kept between steps: fresh pages from the operating system cost more than the step itself.
    std::vector<float> x_, y_, wide_, norm_, rotation_, partial_, statistic_;
    std::vector<unsigned char> activations_, scratch_;
    std::vector<int32_t> chosen_;        // [wanted, chosen_stride], rows of a head in two planes
    std::vector<int64_t> chosen_count_;  // [wanted]
    int64_t scratch_stride_ = 0;
    Pass pass_;
};

}  // namespace dq

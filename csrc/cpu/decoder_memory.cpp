// What a decoder allocates: where the layers' tiles lie in the memory of keys and values, and the workspaces of a step.

#include <algorithm>
#include <numeric>
#include <utility>

#include "decoder.h"

namespace dq {
namespace {

template <typename T>
void grow(std::vector<T>& v, int64_t size) {
    if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
}

}  // namespace

Decoder::Decoder(DecoderModel model) : model_(std::move(model)), kernels_(kernels()) {
    const DecoderModel& m = model_;
    widest_ = std::max(m.layers[0].qkv.w.blocks() * kRows, round_up(m.intermediate, kRows));
    for (const DecoderLayer& layer : m.layers) {
        for (const DecoderLinear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down, &m.head}) {
            scratch_stride_ = std::max(scratch_stride_, scratch_bytes(linear->w, m.exact));
        }
    }
    scratch_stride_ = round_up(std::max(scratch_stride_, 4 * attend_scratch(m.head_dim)), 4096);
}

int64_t Decoder::head_tile_bytes() const { return 2 * kScoreTile * model_.head_dim * (model_.exact ? 4 : 2); }

// Layers with as many tiles (all without a window, all with the same one) share a region, [sequence][tile][layer][head]:
// it fills from its beginning on, so that memory is touched as positions come, in whole pages however large.
Layout Decoder::rings(int64_t batch, int64_t capacity) const {
    const size_t layers = model_.layers.size();
    std::vector<Layout::Place> places(layers);
    const int64_t layer_tile = model_.kv_heads * head_tile_bytes();
    int64_t total = 0, most = 0;
    for (size_t i = 0; i < layers; ++i) {
        if (places[i].ring) continue;
        const int64_t window = model_.layers[i].window;
        const int64_t tiles = round_up(window ? std::min(capacity, window + kChunk - 1) : capacity, kScoreTile) / kScoreTile;
        int64_t stride = 0;
        for (size_t j = i; j < layers; ++j) {
            if (model_.layers[j].window != window) continue;
            places[j] = {total + stride, 0, tiles};
            stride += layer_tile;
        }
        for (size_t j = i; j < layers; ++j) {
            if (model_.layers[j].window == window) places[j].stride = stride;
        }
        total += batch * tiles * stride;
        most = std::max(most, tiles);
    }
    std::vector<int64_t> in_order(static_cast<size_t>(batch * most));
    std::iota(in_order.begin(), in_order.end(), 0);
    return {std::move(places), std::move(in_order), total};
}

// [block][layer][head]: a pass over one sequence reads whole pages, and one of few positions touches few.
Layout Decoder::blocks() const {
    const int64_t layers = static_cast<int64_t>(model_.layers.size()), layer_tile = model_.kv_heads * head_tile_bytes();
    std::vector<Layout::Place> places;
    for (int64_t i = 0; i < layers; ++i) places.push_back({i * layer_tile, layers * layer_tile, 0});
    return {std::move(places), {}, layers * layer_tile};
}

void Decoder::reserve(int threads) {
    const DecoderModel& m = model_;
    const int64_t tokens = pass_.tokens(), mixed = m.heads * m.head_dim;
    grow(x_, tokens * m.hidden);
    grow(y_, tokens * m.hidden);
    grow(wide_, tokens * widest_);
    grow(norm_, tokens * std::max(m.hidden, mixed));
    int64_t angles = 0;
    for (const int64_t dim : m.rope_dims) angles += dim;
    grow(rotation_, tokens * angles);
    grow(partial_, pass_.parts() * mixed);
    grow(statistic_, 2 * pass_.parts() * m.heads);
    int64_t bytes = 0;
    for (const DecoderLayer& layer : m.layers) {
        for (const DecoderLinear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down, &m.head}) {
            Activations unused;
            bytes = std::max(bytes, place_activations(linear->w, tokens, m.exact, nullptr, &unused));
        }
    }
    grow(activations_, bytes + 64);
    if (m.head.w.rest) {
        grow(chosen_, pass_.wanted() * chosen_stride());
        grow(chosen_count_, pass_.wanted());
    }
    grow(scratch_, threads * scratch_stride_ + 64);
}

}  // namespace dq

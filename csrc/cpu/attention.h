// Attention over a key-value cache: types shared by the kernels (attention_impl.h) and the decoder.
#pragma once

#include <cstdint>

namespace dq {

constexpr int kPositions = 16;       // positions of a block of keys
constexpr int64_t kScoreTile = 64;  // positions scored at once
// Up to so many rows (tokens x heads) four tiles may be scored before their softmax: its fixed cost is half of a tile's
// arithmetic then.
constexpr int64_t kFewRows = 12, kWideSpan = 4 * kScoreTile;

// The cache of one layer, sequence and key-value head: tiles of 64 positions, each its keys and then its values. Keys lie
// in blocks of 16 positions, [block][dim][16 positions], so that the scores of 16 positions need no sum across lanes;
// values are [position][dim]. Positions 64 t to 64 t + 63 are in tile blocks[t % tiles], at base + tile * stride.
struct KeyValue {
    unsigned char* base;
    int64_t stride;         // bytes
    const int64_t* blocks;  // [tiles]
    int64_t tiles;
    int64_t dim;    // a multiple of 16
    bool is_half;   // float16, else float32
};

// One unit of attention: tokens x query heads that share a key-value head, over positions [begin, end) of the cache.
struct AttendUnit {
    const float* q;       // first token's first head; [tokens][heads][dim] with the strides below, already scaled
    int64_t token_stride; // floats between tokens
    int64_t tokens, heads;
    int64_t position;     // of the first token; token t sees positions <= position + t
    int64_t window;       // and > position + t - window; 0: no window
    int64_t begin, end;
    int64_t span;         // positions of one softmax, kScoreTile or (up to kFewRows rows) kWideSpan; fixes the order of sums
    float softcap;        // scores become softcap * tanh(score / softcap); 0: off
    KeyValue cache;
    float* out;           // like q: sum of exp(score - top) * value
    int64_t out_stride;
    float* top;           // [tokens][heads] largest score, stride stat_stride between tokens
    float* total;         // [tokens][heads] sum of exp(score - top)
    int64_t stat_stride;
    bool normalise;       // divide out by total
    float* scratch;       // attend_scratch(dim) floats
};

constexpr int64_t kAttendRows = 48;  // tokens x heads taken at once; larger units go in turns
constexpr int64_t attend_scratch(int64_t dim) { return kAttendRows * (kScoreTile + dim); }

}  // namespace dq

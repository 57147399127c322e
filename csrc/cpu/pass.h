// One pass of a decoder: the next tokens of some sequences, and what follows from them once for all layers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace dq {

// The next tokens of one sequence. Prompts and generated tokens are computed in two ways, and each way gives a token the
// same result, bit for bit, wherever the prompt was cut and whatever else is in the pass; but without `exact`, of a
// generated token, only among as many others as are all given 15 bits.
struct Segment {
    int64_t count;          // tokens, next to each other in the pass
    int64_t position;       // of the first; the sequence holds so many already
    int64_t wanted;         // of so many of its last tokens the logits are asked for
    bool generated;         // one token of the decode loop: its attention is split over positions, see also `all_fine`
    const int64_t* blocks;  // positions 64 i to 64 i + 63 lie in tile blocks[i] of the memory; unused with rings
    int64_t tiles;          // entries of blocks
};

// Positions that one unit of a generated token attends to: a fixed number, so that the result depends neither on the
// number of threads nor on the other sequences. 256 positions of 3 heads are about 5 us.
constexpr int64_t kSplit = 256;

// What one unit of the attention does, for each key-value head: some tokens of a segment over positions [begin, end).
struct AttendItem {
    int64_t segment, token, tokens;
    int64_t begin, end;
    int64_t part;  // which of the partial results that are joined afterwards; -1: the result is whole
};

struct Pass {
    std::vector<Segment> segments;
    std::vector<int64_t> owner, position;  // of each token: its segment, its position
    std::vector<int64_t> rows;             // the tokens whose logits are asked for
    std::vector<AttendItem> items;
    int64_t generated;                // segments that are
    std::vector<int64_t> first_part;  // of each segment among the partial results; one entry more than segments

    int64_t tokens() const { return static_cast<int64_t>(owner.size()); }
    int64_t wanted() const { return static_cast<int64_t>(rows.size()); }
    int64_t parts() const { return first_part.back(); }
    // Whether a token's activations have 15 bits in every group: where few texts are being generated, since the weights'
    // way from memory is what they wait for then.
    bool all_fine(int64_t token) const { return generated <= kFineTokens && segment_of(token).generated; }
    const Segment& segment_of(int64_t token) const { return segments[static_cast<size_t>(owner[static_cast<size_t>(token)])]; }

    // Fills everything but the segments; prompts are cut into items of `tokens_per_item`.
    void plan(int64_t tokens_per_item) {
        owner.clear(), position.clear(), rows.clear(), items.clear();
        first_part.assign(1, 0);
        generated = 0;
        for (const Segment& s : segments) {
            generated += s.generated;
            const int64_t index = static_cast<int64_t>(first_part.size()) - 1, first = tokens();
            for (int64_t t = 0; t < s.count; ++t) {
                owner.push_back(index);
                position.push_back(s.position + t);
                if (t >= s.count - s.wanted) rows.push_back(first + t);
            }
            const int64_t splits = s.generated ? s.position / kSplit + 1 : 1;
            for (int64_t part = 0; splits > 1 && part < splits; ++part) {
                items.push_back({index, first, 1, part * kSplit, (part + 1) * kSplit, parts() + part});
            }
            for (int64_t t = 0; splits == 1 && t < s.count; t += tokens_per_item) {
                items.push_back({index, first + t, std::min(tokens_per_item, s.count - t), 0, INT64_MAX, -1});
            }
            first_part.push_back(parts() + (splits > 1 ? splits : 0));
        }
    }
};

}  // namespace dq

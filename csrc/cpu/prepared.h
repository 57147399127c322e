// Weights in the order the CPU kernels want them, made once at load (repack.cpp) from the canonical bitstream.
//
// Rows are taken 16 at a time (a block), columns 4 at a time (a quad): 16 rows x 4 columns are 64 bytes, one AVX-512
// register whose 32-bit lane r holds 4 codes of row r. A dot product of a quad with 4 activations, broadcast to every
// lane, then needs no sum across lanes, and one vector of 16 scales serves a whole group. Several quads share one
// stored unit of 64-byte vectors V0, V1, ...; byte i of each belongs to byte i of the quads q0, q1, ...:
//
//   8 bits  1 quad,  4 columns, 1 vector    V0 = q0
//   4 bits  2 quads, 8 columns, 1 vector    V0 = q0 | q1 << 4 (kTable too)
//   2 bits  4 quads, 16 columns, 1 vector   V0 = q0 | q1 << 2 | q2 << 4 | q3 << 6
//   3 bits  8 quads, 32 columns, 3 vectors  V0 = q0 | q1 << 3 | (q6 & 3) << 6
//                                           V1 = q2 | q3 << 3 | (q7 & 3) << 6
//                                           V2 = q4 | q5 << 3 | (q6 >> 2) << 6 | (q7 >> 2) << 7
//   6 bits  4 quads, 16 columns, 3 vectors  V0 = q0 | (q3 & 3) << 6
//                                           V1 = q1 | (q3 >> 2 & 3) << 6
//                                           V2 = q2 | (q3 >> 4) << 6
//
// so 3 bits cost 3 bits, and 17 shifts and masks unpack 8 quads: 2.1 a quad, against 1.5 for 4 bits and 2.25 for 6. 5 bits
// are stored in 6, 7 in 8. Weights that stay unquantized (kFloat) keep their 16-bit floats, [block][column][16 rows].
//
// A row's K columns are cut into `groups` blocks of `group` columns that share a scale, each padded to whole units (of
// `padded` columns; the activations there are zero, so the codes do not matter). In memory: codes [block][group][unit],
// scales and zero points [block][group][16 rows].
//
// A large head has two planes (`rest`): values scale * (4 (h - 32) + l - 1.5), of which h, 6 bits, is what the matmul reads, with
// four times the scale, and l, 2 bits, lies by rows [n][k / 64][20], for the few rows whose logits matter (head.h). Of 64
// columns, byte i < 16 holds columns i, 16 + i, 32 + i and 48 + i, the first in its lowest bits; behind them are the two
// scales once more, since those of the matmul lie 16 rows to a line: a row refined would read one more line for every group.
#pragma once

#include <cstdint>

namespace dq {

constexpr int kRows = 16;   // rows of a block
constexpr int kFloat = 16;  // `storage` of unquantized weights
constexpr int kTable = 20;  // of codes of 4 bits that are places in a table of levels

constexpr int kRestBytes = 20;  // of 64 columns of a lower plane

constexpr int quads_per_unit(int storage) {
    return storage == 8 ? 1 : storage == 4 || storage == kTable ? 2 : storage == 3 ? 8 : 4;
}
constexpr int unit_bytes(int storage) { return storage == 3 || storage == 6 ? 192 : 64; }

// kTable: level i is values[i], and where activations are integers step * (bytes[i] - middle). That is the same for the
// 4-bit float e2m1, whose levels are multiples of 0.5, and within half a step, 1/254 of the largest level, for others.
struct Levels {
    float values[16];
    uint8_t bytes[16];
    float step;
};

struct Prepared {
    const uint8_t* codes;
    const uint16_t* scale;  // nullptr for kFloat
    const uint8_t* zero;    // nullptr: every zero point is `middle`
    int64_t n, k;           // out_features (the last block is padded with zero scales), in_features = groups * group
    int64_t groups, group, padded;
    int storage;  // 2, 3, 4, 6, 8, kFloat or kTable
    int middle;
    bool is_bf16;  // the scales, or the weights of kFloat; else float16
    Levels levels;  // of kTable; it has no zero points, and `middle` is that of `bytes`
    uint8_t* rest;  // the lower plane of a head, nullptr without; storage 6, groups of 32, k a multiple of 64

    int64_t blocks() const { return (n + kRows - 1) / kRows; }
    int64_t columns() const { return groups * padded; }
    int64_t rest_stride() const { return k / 64 * kRestBytes; }
    int64_t group_bytes() const {
        return storage == kFloat ? padded * kRows * 2 : padded / (4 * quads_per_unit(storage)) * unit_bytes(storage);
    }
    int64_t block_bytes() const { return groups * group_bytes(); }
};

// Activations of `tokens` rows, padded like the weight they meet: column c of group g is at g * padded + c.
//
// A fine token has 15 bits everywhere: x = scale * (q + rest / 256), two products. For very few tokens the second costs
// nothing, since memory is what they wait for.
//
// Any other token has 8: x = scale * (q + 254 * rest). Where a group's largest value is so large that it would take the
// precision of the others, the scale is that of the others, and rest holds what is beyond 127 of it: it is zero elsewhere,
// and multiplied only where it is not (`touched`). The two make one integer sum: |sum| <= sum |x| / scale <=
// 127 / kOutlierRange * sqrt(group * k), and half a unit a value, so that 255 times it stays below 2^31 up to
// group = k = 66000.
//
// SmolLM2-135M at 4 bits, KL to exact activations: 6.7e-3 with 8 bits and no outliers, 8.1e-4 with them, below 1e-7 with
// every token fine.
//
// Tokens of prompts are bfloat16 instead where the instruction set multiplies those (AMX): x = half, nothing else is set.
constexpr int32_t kOutlierUnit = 254;

enum class Held : uint8_t { kEightBits, kFifteenBits, kBfloat16 };

// A product of tiles of bfloat16 takes 32 columns and 16 tokens: so many are laid out, and read.
constexpr int kHalfColumns = 32, kHalfTokens = 16;
inline int64_t half_columns_of(int64_t columns) { return (columns + kHalfColumns - 1) / kHalfColumns * kHalfColumns; }

struct Activations {
    int8_t *q, *rest;    // [tokens, columns], in [-127, 127]
    float* scale;        // [tokens, groups]: what the group's q of 127 stands for / 127
    int32_t* sum;        // [tokens, groups]: of q; where the token is not fine, of q + 254 * rest
    int32_t* rest_sum;   // [tokens, groups]: of rest, of fine tokens
    uint32_t* touched;   // [tokens, groups]: of other tokens, bit i where rest is not 0 in quads i * quads_per_bit(w) and on
    Held* held;          // [tokens]: how each token's activations are held
    uint16_t* half;      // [tokens, half_columns()]: bfloat16, zeros behind the row's columns
    float* x;            // [tokens, columns]: the exact path instead of all of the above
    int64_t columns, groups;

    // Where there is one for every group of a token: one token's lie together, so that no two threads write to a line.
    int64_t at(int64_t token, int64_t group) const { return token * groups + group; }
    int64_t half_columns() const { return half_columns_of(columns); }
};

inline int64_t quads_per_bit(const Prepared& w) { return (w.padded / 4 + 31) / 32; }

// Lays out activations of `tokens` rows for `w` from `start` (64-byte aligned) on; nullptr only measures. Returns bytes.
inline int64_t place_activations(const Prepared& w, int64_t tokens, bool exact, unsigned char* start, Activations* a) {
    const uint64_t cells = static_cast<uint64_t>(tokens * w.columns()), blocks = static_cast<uint64_t>(tokens * w.groups);
    *a = {};
    a->columns = w.columns();
    a->groups = w.groups;
    if (exact) {
        a->x = reinterpret_cast<float*>(start);
        return static_cast<int64_t>(4 * cells);
    }
    const uintptr_t at = reinterpret_cast<uintptr_t>(start);
    a->scale = reinterpret_cast<float*>(at);
    a->sum = reinterpret_cast<int32_t*>(at + 4 * blocks);
    a->rest_sum = reinterpret_cast<int32_t*>(at + 8 * blocks);
    a->touched = reinterpret_cast<uint32_t*>(at + 12 * blocks);
    a->q = reinterpret_cast<int8_t*>(at + 16 * blocks);
    a->rest = reinterpret_cast<int8_t*>(at + 16 * blocks + cells);
    a->held = reinterpret_cast<Held*>(at + 16 * blocks + 2 * cells);
    const uint64_t half = (16 * blocks + 2 * cells + static_cast<uint64_t>(tokens) + 63) / 64 * 64;
    a->half = reinterpret_cast<uint16_t*>(at + half);
    return static_cast<int64_t>(half) + 2 * (tokens + kHalfTokens - 1) * half_columns_of(w.columns());
}

// What becomes of the products x @ w.T.
enum class Epilogue : int {
    kStore,    // y[token][row] = product (+ bias[row])
    kSiluMul,  // blocks alternate gate, up: y[token][b * 16 + r] = silu(gate) * up
    kGeluMul,  // the same with gelu (tanh form)
};

struct Output {
    float* y;
    int64_t stride;     // floats between two tokens; a whole last block must fit unless `n` cuts it
    int64_t n;          // rows stored
    const float* bias;  // [blocks * 16] or nullptr
    Epilogue epilogue;
};

}  // namespace dq

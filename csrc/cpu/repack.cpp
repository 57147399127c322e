#include "repack.h"

#include <cstring>
#include <vector>

#include "../layout.h"
#include "pool.h"
#include "vec.h"

namespace dq {
namespace {

void unpack_row(const int32_t* row, int64_t k, int bits, uint8_t* out) {
    const int64_t words = words_per_row(k, bits);
    switch (bits) {
        case 2: return unpack_codes<2>(row, words, 0, k, out);
        case 3: return unpack_codes<3>(row, words, 0, k, out);
        case 4: return unpack_codes<4>(row, words, 0, k, out);
        case 5: return unpack_codes<5>(row, words, 0, k, out);
        case 6: return unpack_codes<6>(row, words, 0, k, out);
        case 7: return unpack_codes<7>(row, words, 0, k, out);
        default: return unpack_codes<8>(row, words, 0, k, out);
    }
}

// One unit of a block. rows: 16 rows of codes, `stride` apart, from the unit's first column on. Four codes travel as
// one 32-bit word: no code of a quad exceeds its share of the byte, so shifts never cross bytes.
template <int Storage>
void pack_unit(const uint8_t* rows, int64_t stride, uint8_t* out) {
    constexpr int kQuads = quads_per_unit(Storage);
    uint32_t q[8][kRows] = {};
    for (int i = 0; i < kQuads; ++i) {
        for (int r = 0; r < kRows; ++r) std::memcpy(&q[i][r], rows + r * stride + 4 * i, 4);
    }
    uint32_t v[3][kRows];
    constexpr uint32_t low = 0x03030303;
    for (int r = 0; r < kRows; ++r) {
        if constexpr (Storage == 8) {
            v[0][r] = q[0][r];
        } else if constexpr (Storage == 4) {
            v[0][r] = q[0][r] | q[1][r] << 4;
        } else if constexpr (Storage == 2) {
            v[0][r] = q[0][r] | q[1][r] << 2 | q[2][r] << 4 | q[3][r] << 6;
        } else if constexpr (Storage == 6) {
            v[0][r] = q[0][r] | (q[3][r] & low) << 6;
            v[1][r] = q[1][r] | (q[3][r] & low << 2) << 4;
            v[2][r] = q[2][r] | (q[3][r] & low << 4) << 2;
        } else {
            v[0][r] = q[0][r] | q[1][r] << 3 | (q[6][r] & low) << 6;
            v[1][r] = q[2][r] | q[3][r] << 3 | (q[7][r] & low) << 6;
            v[2][r] = q[4][r] | q[5][r] << 3 | (q[6][r] & ~low) << 4 | (q[7][r] & ~low) << 5;
        }
    }
    std::memcpy(out, v, unit_bytes(Storage));
}

// rows: [16][w.columns()] codes.
void pack_block(const Prepared& w, const uint8_t* rows, uint8_t* out) {
    const int64_t stride = w.columns();
    const int64_t step = 4 * quads_per_unit(w.storage);
    for (int64_t c = 0; c < stride; c += step, out += unit_bytes(w.storage)) {
        switch (w.storage) {
            case 2: pack_unit<2>(rows + c, stride, out); break;
            case 3: pack_unit<3>(rows + c, stride, out); break;
            case 4: pack_unit<4>(rows + c, stride, out); break;
            case kTable: pack_unit<4>(rows + c, stride, out); break;
            case 6: pack_unit<6>(rows + c, stride, out); break;
            default: pack_unit<8>(rows + c, stride, out); break;
        }
    }
}

// codes [k] -> [groups][padded]; the padding keeps whatever the buffer held, which is a valid code.
void place_groups(const Prepared& w, const uint8_t* codes, uint8_t* out) {
    for (int64_t g = 0; g < w.groups; ++g) {
        std::memcpy(out + g * w.padded, codes + g * w.group, static_cast<size_t>(w.group));
    }
}

// Values [first, first + count) as float32. A loop a type, so that the compiler vectorises it.
void read_floats(const FloatSource& s, int64_t first, int64_t count, float* out) {
    if (s.type == FloatType::kFloat32) {
        std::memcpy(out, static_cast<const float*>(s.values) + first, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    const uint16_t* in = static_cast<const uint16_t*>(s.values) + first;
    if (s.type == FloatType::kFloat16) {
        for (int64_t i = 0; i < count; ++i) out[i] = float_of_half(in[i]);
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t wide = static_cast<uint32_t>(in[i]) << 16;
        std::memcpy(out + i, &wide, 4);
    }
}

uint16_t bf16_up(float v) {  // smallest bfloat16 >= v, for v >= 0
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return static_cast<uint16_t>((bits + 0xFFFF) >> 16);
}

// A row of floats x [k] to 8-bit codes [k] and its groups' scales, kRows apart. Where there are two planes the scale is that
// of the upper one, whose steps are four of the codes', and codes stand for half a step more: so the lower plane's mean is zero.
void quantize_row(const Prepared& w, const float* x, uint8_t* codes, uint16_t* scale) {
    const float most = w.rest ? 125.0f / 4.0f : 127.0f, share = w.rest ? 0.25f : 1.0f, offset = w.rest ? 0.5f : 0.0f;
    for (int64_t g = 0; g < w.groups; ++g, x += w.group, codes += w.group) {
        // As integers, magnitudes are ordered like the floats they are, and their maximum is one instruction.
        uint32_t largest_bits = 0;
        for (int64_t i = 0; i < w.group; ++i) {
            uint32_t bits;
            std::memcpy(&bits, x + i, 4);
            bits &= 0x7FFFFFFF;
            largest_bits = bits > largest_bits ? bits : largest_bits;
        }
        float largest;
        std::memcpy(&largest, &largest_bits, 4);
        const uint16_t rounded = bf16_up(largest / most);
        scale[g * kRows] = rounded;
        const uint32_t wide = static_cast<uint32_t>(rounded) << 16;
        float step;
        std::memcpy(&step, &wide, 4);
        step *= share;
        const float inverse = step > 1e-37f ? 1.0f / step : 0.0f;  // a group of zeros
        for (int64_t i = 0; i < w.group; ++i) {
            const float code = ((x[i] * inverse - offset) + 12582912.0f) - 12582912.0f;
            codes[i] = static_cast<uint8_t>(128 + static_cast<int>(code));
        }
    }
}

// Codes [k] of 2 .. 253 to their upper planes, in place, and to the lower one's row with a copy of its scales, which come
// kRows apart (prepared.h).
void split_planes(int64_t k, uint8_t* codes, const uint16_t* scale, uint8_t* rest) {
    for (int64_t c = 0; c < k; c += 64, codes += 64, scale += 2 * kRows, rest += kRestBytes) {
        for (int i = 0; i < 16; ++i) {
            int four = 0;
            for (int j = 0; j < 4; ++j) four |= ((codes[16 * j + i] + 2) & 3) << (2 * j);
            rest[i] = static_cast<uint8_t>(four);
        }
        std::memcpy(rest + 16, scale, 2);
        std::memcpy(rest + 18, scale + kRows, 2);
        for (int i = 0; i < 64; ++i) codes[i] = static_cast<uint8_t>((codes[i] + 2) >> 2);
    }
}

// body(block of the source, first row, rows) for every block, in parallel.
template <typename Body>
void every_block(int64_t n, int threads, const Body& body) {
    parallel_rows((n + kRows - 1) / kRows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t row = b * kRows;
            body(b, row, n - row < kRows ? n - row : kRows);
        }
    });
}

}  // namespace

int storage_of(int bits, int64_t group) {
    int best = 8;
    int64_t fewest = INT64_MAX;
    for (const int storage : {8, 6, 4, 3, 2}) {  // from the cheapest to unpack; only fewer bytes win over that
        if (storage < bits) break;
        const int64_t unit = 4 * quads_per_unit(storage);
        const int64_t bytes = (group + unit - 1) / unit * unit_bytes(storage);
        if (bytes < fewest) {
            fewest = bytes;
            best = storage;
        }
    }
    return best;
}

void repack(const PackedSource& s, const Target& t, int threads) {
    const Prepared& w = t.w;
    const int64_t words = words_per_row(w.k, s.bits);
    const int64_t source_groups = w.k / s.group_size, repeats = s.group_size / w.group;
    every_block(s.n, threads, [&](int64_t b, int64_t first_row, int64_t rows) {
        std::vector<uint8_t> line(static_cast<size_t>(w.k)), codes(static_cast<size_t>(kRows * w.columns()));
        const int64_t block = t.first + b * t.step;
        uint16_t* scale = t.scale + block * w.groups * kRows;
        uint8_t* zero = t.zero ? t.zero + block * w.groups * kRows : nullptr;
        for (int64_t r = 0; r < kRows; ++r) {
            if (r < rows) {
                unpack_row(s.packed + (first_row + r) * words, w.k, s.bits, line.data());
                place_groups(w, line.data(), codes.data() + r * w.columns());
            }
            for (int64_t g = 0; g < w.groups; ++g) {
                const int64_t from = (first_row + r) * source_groups + g / repeats;
                scale[g * kRows + r] = r < rows ? s.scale[from] : 0;
                if (zero) {
                    const int middle = 1 << (s.bits - 1);
                    zero[g * kRows + r] = r < rows && s.zero ? s.zero[from] : static_cast<uint8_t>(middle);
                }
            }
        }
        pack_block(w, codes.data(), t.codes + block * w.block_bytes());
    });
}

void repack(const FloatSource& s, const Target& t, int threads) {
    const Prepared& w = t.w;
    every_block(s.n, threads, [&](int64_t b, int64_t first_row, int64_t rows) {
        const int64_t block = t.first + b * t.step;
        if (w.storage == kFloat) {  // one group, padded to a multiple of 4 columns
            uint16_t* out = reinterpret_cast<uint16_t*>(t.codes + block * w.block_bytes());
            const uint16_t* in = static_cast<const uint16_t*>(s.values) + first_row * w.k;
            for (int64_t c = 0; c < w.columns(); ++c) {
                for (int64_t r = 0; r < kRows; ++r) out[c * kRows + r] = r < rows && c < w.k ? in[r * w.k + c] : 0;
            }
            return;
        }
        std::vector<uint8_t> line(static_cast<size_t>(w.k)), codes(static_cast<size_t>(kRows * w.columns()));
        std::vector<float> x(static_cast<size_t>(w.k));
        uint16_t* scale = t.scale + block * w.groups * kRows;
        for (int64_t r = 0; r < kRows; ++r) {
            if (r < rows) {
                read_floats(s, (first_row + r) * w.k, w.k, x.data());
                quantize_row(w, x.data(), line.data(), scale + r);
                if (w.rest) split_planes(w.k, line.data(), scale + r, w.rest + (block * kRows + r) * w.rest_stride());
                place_groups(w, line.data(), codes.data() + r * w.columns());
            } else {
                for (int64_t g = 0; g < w.groups; ++g) scale[g * kRows + r] = 0;
            }
        }
        pack_block(w, codes.data(), t.codes + block * w.block_bytes());
    });
}

}  // namespace dq

// The canonical bit order of packed codes: that of compressed-tensors >= 0.18 "pack-quantized", defined in PyTorch by
// dq_runtime/packing/layout.py.
//
// A row of K codes of b bits (2 <= b <= 8) is one dense little-endian bitstream: code k occupies bits k*b .. k*b+b-1 of
// the row, bit i of the row is bit i % 32 of int32 word i / 32, and the last word is padded with zeros. A row therefore
// has ceil(K*b/32) words, and nothing lies between rows.
//
// Two facts make it fast: 8 codes fill exactly b bytes, so every 8th code starts on a byte; and b bytes fit a 64-bit
// register, where three shift-and-mask steps move 8 codes to 8 bytes (12 operations, no branch, no table).
//
// Every function here is `static`: files are compiled with different -m flags, and the linker may keep any one copy of
// an ordinary inline function, so an AVX2 copy could end up in the scalar path of a machine without AVX2.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "dq_runtime reads the bitstream in 64-bit pieces and needs a little-endian machine"
#endif

namespace dq {

// int32 words that hold k codes of `bits` bits.
static inline int64_t words_per_row(int64_t k, int bits) { return (k * bits + 31) / 32; }

// Code k of a row, straight from the definition; reads a second word only where the code straddles two.
static inline uint8_t code_at(const int32_t* row, int64_t k, int bits) {
    const int64_t bit = k * bits;
    const int64_t word = bit / 32;
    const int shift = static_cast<int>(bit % 32);
    uint32_t value = static_cast<uint32_t>(row[word]) >> shift;
    if (shift + bits > 32) value |= static_cast<uint32_t>(row[word + 1]) << (32 - shift);
    return static_cast<uint8_t>(value & ((1u << bits) - 1));
}

static constexpr uint64_t low_bits(int count) { return (uint64_t{1} << count) - 1; }

// 8 codes in the low 8*Bits bits -> one code per byte. Higher bits of v are ignored.
template <int Bits>
static inline uint64_t spread8(uint64_t v) {
    constexpr uint64_t m4 = low_bits(4 * Bits);                // 4 codes in each 32-bit half
    constexpr uint64_t m2 = low_bits(2 * Bits) * 0x100000001;  // 2 codes in each 16-bit quarter
    constexpr uint64_t m1 = low_bits(Bits) * 0x1000100010001;  // 1 code in each byte
    v = (v & m4) | ((v << (32 - 4 * Bits)) & (m4 << 32));
    v = (v & m2) | ((v << (16 - 2 * Bits)) & (m2 << 16));
    v = (v & m1) | ((v << (8 - Bits)) & (m1 << 8));
    return v;
}

// The inverse: one code per byte -> 8 codes in the low 8*Bits bits. Bits of a byte above Bits are dropped.
template <int Bits>
static inline uint64_t gather8(uint64_t v) {
    constexpr uint64_t m4 = low_bits(4 * Bits);
    constexpr uint64_t m2 = low_bits(2 * Bits) * 0x100000001;
    constexpr uint64_t m1 = low_bits(Bits) * 0x1000100010001;
    v = (v & m1) | ((v & (m1 << 8)) >> (8 - Bits));
    v = (v & m2) | ((v & (m2 << 16)) >> (16 - 2 * Bits));
    v = (v & m4) | ((v & (m4 << 32)) >> (32 - 4 * Bits));
    return v;
}

// 8 bytes of a row from byte `at` on; bytes past its end (row_bytes, a multiple of 4) are zero and are not read.
static inline uint64_t load8(const uint8_t* row, int64_t at, int64_t row_bytes) {
    uint64_t v = 0;
    if (at + 8 <= row_bytes) {
        std::memcpy(&v, row + at, 8);
        return v;
    }
    if (row_bytes >= 8) {
        std::memcpy(&v, row + row_bytes - 8, 8);
        return v >> (8 * (at - (row_bytes - 8)));
    }
    std::memcpy(&v, row, 4);
    return v >> (8 * at);
}

// Codes k0 .. k0+count-1 of a row of `words` words, one per byte; k0 must be a multiple of 8.
template <int Bits>
static inline void unpack_codes(const int32_t* row, int64_t words, int64_t k0, int64_t count, uint8_t* out) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(row);
    const int64_t row_bytes = words * 4;
    int64_t i = 0;
    // Reading 8 bytes where b are needed is safe until the row's last 8 bytes; load8 handles those.
    const int64_t safe_at = row_bytes - 8;
    int64_t at = k0 / 8 * Bits;
    for (; i + 8 <= count && at <= safe_at; i += 8, at += Bits) {
        uint64_t v;
        std::memcpy(&v, bytes + at, 8);
        v = spread8<Bits>(v);
        std::memcpy(out + i, &v, 8);
    }
    for (; i + 8 <= count; i += 8, at += Bits) {
        const uint64_t v = spread8<Bits>(load8(bytes, at, row_bytes));
        std::memcpy(out + i, &v, 8);
    }
    for (; i < count; ++i) out[i] = code_at(row, k0 + i, Bits);
}

// k codes, one per byte -> the row's words_per_row(k, Bits) words, the last one padded with zeros.
template <int Bits>
static inline void pack_codes(const uint8_t* codes, int64_t k, int32_t* row) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(row);
    const int64_t row_bytes = words_per_row(k, Bits) * 4;
    int64_t at = 0;
    for (int64_t i = 0; i < k; i += 8) {
        const int64_t count = k - i < 8 ? k - i : 8;
        uint64_t v = 0;
        std::memcpy(&v, codes + i, static_cast<size_t>(count));
        v = gather8<Bits>(v);
        const int64_t room = row_bytes - at;
        std::memcpy(bytes + at, &v, static_cast<size_t>(room < Bits ? room : Bits));
        at += Bits;
    }
    if (at < row_bytes) std::memset(bytes + at, 0, static_cast<size_t>(row_bytes - at));
}

}  // namespace dq

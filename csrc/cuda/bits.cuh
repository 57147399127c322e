// What one thread does with 32 codes of the canonical bit order (csrc/layout.h): pack, unpack, count differences.
//
// 32 codes of b bits fill exactly b words, whatever b is, so blocks of 32 share no word and no thread waits for another.
// A block lives in registers: its codes as 8 words of 4 bytes each, so that a 16-byte access moves 16 codes, and every
// loop over them is unrolled, because a register has no address: a loop that is not would put the block in local memory.
//
// Nothing here needs a GPU: g++ compiles the same functions for csrc/cuda/host.cpp, whose callers test them everywhere.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DQ_HD __host__ __device__ __forceinline__
#define DQ_UNROLL _Pragma("unroll")
#else
#define DQ_HD inline
#define DQ_UNROLL
#endif

namespace dq {

constexpr int kBlock = 32;  // codes a thread

struct alignas(16) Bytes16 {
    uint32_t v[4];
};
struct alignas(8) Bytes8 {
    uint32_t v[2];
};

DQ_HD bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Where block `index` of an [N, K] tensor of codes lies. Index 0 is the first block of row 0; a row has ceil(K/32).
struct Place {
    int64_t row, first;  // first code, a multiple of 32
    int count;           // codes, 32 except at a row's end
};

DQ_HD int64_t blocks_per_row(int64_t k) { return (k + kBlock - 1) / kBlock; }

DQ_HD Place place_of(int64_t index, int64_t k) {
    const int64_t per_row = blocks_per_row(k);
    Place p;
    // A 64-bit division is about 100 instructions on a GPU, as many as the rest of the thread; a 32-bit one about 20.
    if (((index | per_row) >> 32) == 0) {
        p.row = static_cast<uint32_t>(index) / static_cast<uint32_t>(per_row);
    } else {
        p.row = index / per_row;
    }
    p.first = (index - p.row * per_row) * kBlock;
    p.count = k - p.first < kBlock ? static_cast<int>(k - p.first) : kBlock;
    return p;
}

DQ_HD int words_of(int count, int bits) { return (count * bits + 31) / 32; }

// 4 codes, one a byte -> the low 4*Bits bits. What a byte holds above Bits is dropped, not merged into its neighbour.
template <int Bits>
DQ_HD uint32_t gather4(uint32_t v) {
    v &= 0x01010101u * ((1u << Bits) - 1);
    v = (v & 0x00ff00ffu) | ((v & 0xff00ff00u) >> (8 - Bits));
    return (v & 0xffffu) | ((v >> 16) << (2 * Bits));
}

// The inverse; bits of v above 4*Bits are ignored.
template <int Bits>
DQ_HD uint32_t spread4(uint32_t v) {
    constexpr uint32_t pair = (1u << (2 * Bits)) - 1, one = (1u << Bits) - 1;
    v = (v & pair) | (((v >> (2 * Bits)) & pair) << 16);
    return (v & (one * 0x00010001u)) | ((v << (8 - Bits)) & (one * 0x01000100u));
}

template <int Bits>
DQ_HD void pack32(const uint32_t (&bytes)[8], uint32_t (&words)[Bits]) {
    DQ_UNROLL for (int w = 0; w < Bits; ++w) words[w] = 0;
    DQ_UNROLL for (int i = 0; i < 8; ++i) {
        const uint32_t v = gather4<Bits>(bytes[i]);
        const int word = i * 4 * Bits / 32, shift = i * 4 * Bits % 32;
        words[word] |= v << shift;
        if (shift + 4 * Bits > 32) words[word + 1] |= v >> (32 - shift) % 32;
    }
}

template <int Bits>
DQ_HD void unpack32(const uint32_t (&words)[Bits], uint32_t (&bytes)[8]) {
    DQ_UNROLL for (int i = 0; i < 8; ++i) {
        const int word = i * 4 * Bits / 32, shift = i * 4 * Bits % 32;
        uint32_t v = words[word] >> shift;
        if (shift + 4 * Bits > 32) v |= words[word + 1] << (32 - shift) % 32;
        bytes[i] = spread4<Bits>(v);
    }
}

// `count` of Words words from memory, the rest zero. All of them, and aligned: in the widest accesses that divide Words.
template <int Words>
DQ_HD void load_words(const uint32_t* p, int count, uint32_t (&out)[Words]) {
    if (Words % 4 == 0 && count == Words && aligned(p, 16)) {
        DQ_UNROLL for (int i = 0; i < Words / 4; ++i) {
            const Bytes16 v = reinterpret_cast<const Bytes16*>(p)[i];
            DQ_UNROLL for (int j = 0; j < 4; ++j) out[4 * i + j] = v.v[j];
        }
    } else if (Words % 2 == 0 && count == Words && aligned(p, 8)) {
        DQ_UNROLL for (int i = 0; i < Words / 2; ++i) {
            const Bytes8 v = reinterpret_cast<const Bytes8*>(p)[i];
            DQ_UNROLL for (int j = 0; j < 2; ++j) out[2 * i + j] = v.v[j];
        }
    } else {
        DQ_UNROLL for (int i = 0; i < Words; ++i) out[i] = i < count ? p[i] : 0;
    }
}

template <int Words>
DQ_HD void store_words(const uint32_t (&in)[Words], int count, uint32_t* p) {
    if (Words % 4 == 0 && count == Words && aligned(p, 16)) {
        DQ_UNROLL for (int i = 0; i < Words / 4; ++i) {
            reinterpret_cast<Bytes16*>(p)[i] = {in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3]};
        }
    } else if (Words % 2 == 0 && count == Words && aligned(p, 8)) {
        DQ_UNROLL for (int i = 0; i < Words / 2; ++i) reinterpret_cast<Bytes8*>(p)[i] = {in[2 * i], in[2 * i + 1]};
    } else {
        DQ_UNROLL for (int i = 0; i < Words; ++i) {
            if (i < count) p[i] = in[i];
        }
    }
}

// `count` codes from memory, zeros after them; aligned blocks in two 16-byte accesses, others byte by byte.
DQ_HD void load_codes(const uint8_t* p, int count, uint32_t (&bytes)[8]) {
    if (count == kBlock && aligned(p, 16)) {
        load_words<8>(reinterpret_cast<const uint32_t*>(p), 8, bytes);
        return;
    }
    DQ_UNROLL for (int i = 0; i < 8; ++i) bytes[i] = 0;
    DQ_UNROLL for (int i = 0; i < kBlock; ++i) {
        if (i < count) bytes[i / 4] |= static_cast<uint32_t>(p[i]) << (8 * (i % 4));
    }
}

DQ_HD void store_codes(const uint32_t (&bytes)[8], int count, uint8_t* p) {
    if (count == kBlock && aligned(p, 16)) {
        store_words<8>(bytes, 8, reinterpret_cast<uint32_t*>(p));
        return;
    }
    DQ_UNROLL for (int i = 0; i < kBlock; ++i) {
        if (i < count) p[i] = static_cast<uint8_t>(bytes[i / 4] >> (8 * (i % 4)));
    }
}

// Block `index` of codes [N, K] -> its words of packed [N, row_words]. The row's last word is padded with zeros, because
// load_codes reads zeros past the row's end.
template <int Bits>
DQ_HD void pack_block(int64_t index, const uint8_t* codes, int64_t k, int64_t row_words, uint32_t* packed) {
    const Place at = place_of(index, k);
    uint32_t bytes[8], words[Bits];
    load_codes(codes + at.row * k + at.first, at.count, bytes);
    pack32<Bits>(bytes, words);
    store_words<Bits>(words, words_of(at.count, Bits), packed + at.row * row_words + at.first / kBlock * Bits);
}

template <int Bits>
DQ_HD void load_block(const Place& at, const uint32_t* packed, int64_t row_words, uint32_t (&bytes)[8]) {
    uint32_t words[Bits];
    load_words<Bits>(packed + at.row * row_words + at.first / kBlock * Bits, words_of(at.count, Bits), words);
    unpack32<Bits>(words, bytes);
}

template <int Bits>
DQ_HD void unpack_block(int64_t index, const uint32_t* packed, int64_t k, int64_t row_words, uint8_t* codes) {
    const Place at = place_of(index, k);
    uint32_t bytes[8];
    load_block<Bits>(at, packed, row_words, bytes);
    store_codes(bytes, at.count, codes + at.row * k + at.first);
}

DQ_HD int bits_set(uint32_t v) {
#ifdef __CUDA_ARCH__
    return __popc(v);
#else
    return __builtin_popcount(v);
#endif
}

// Codes of block `index` that differ between two packed tensors; padding bits do not count.
template <int Bits>
DQ_HD int different_in_block(int64_t index, const uint32_t* a, const uint32_t* b, int64_t k, int64_t row_words) {
    const Place at = place_of(index, k);
    uint32_t left[8], right[8];
    load_block<Bits>(at, a, row_words, left);
    load_block<Bits>(at, b, row_words, right);
    int count = 0;
    DQ_UNROLL for (int i = 0; i < 8; ++i) {
        const int valid = at.count - 4 * i;
        const uint32_t d = (left[i] ^ right[i]) & (valid >= 4 ? ~0u : valid <= 0 ? 0u : (1u << (8 * valid)) - 1);
        // The top bit of each byte that is not zero: no carry leaves a byte, since 0x7f + 0x7f < 0x100.
        count += bits_set((((d & 0x7f7f7f7fu) + 0x7f7f7f7fu) | d) & 0x80808080u);
    }
    return count;
}

}  // namespace dq

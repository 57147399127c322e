// The per-thread functions of the GPU kernels as loops over their threads, for g++: what a thread does is so tested
// exhaustively without a GPU (tests/unit/test_cuda_host.py). Compile with -ffp-contract=off, as nvcc does with
// -fmad=false, and with -fno-strict-aliasing, because 16-byte accesses reinterpret bytes.

#include "bits.cuh"
#include "grid.cuh"

namespace {

int64_t blocks(int64_t n, int64_t k) { return n * dq::blocks_per_row(k); }
int64_t row_words(int64_t k, int bits) { return (k * bits + 31) / 32; }

template <int Bits>
void pack(const uint8_t* codes, int64_t n, int64_t k, uint32_t* packed) {
    for (int64_t i = 0; i < blocks(n, k); ++i) dq::pack_block<Bits>(i, codes, k, row_words(k, Bits), packed);
}

template <int Bits>
void unpack(const uint32_t* packed, int64_t n, int64_t k, uint8_t* codes) {
    for (int64_t i = 0; i < blocks(n, k); ++i) dq::unpack_block<Bits>(i, packed, k, row_words(k, Bits), codes);
}

template <int Bits>
int64_t count_different(const uint32_t* a, const uint32_t* b, int64_t n, int64_t k) {
    int64_t count = 0;
    for (int64_t i = 0; i < blocks(n, k); ++i) {
        count += dq::different_in_block<Bits>(i, a, b, k, row_words(k, Bits));
    }
    return count;
}

template <dq::Dtype D>
int fit(const void* weights, int64_t groups, int64_t size, int lanes, const dq::Grid& grid, uint16_t* scales,
        uint8_t* zeros, uint8_t* codes) {
    int problem = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const auto* group = static_cast<const typename dq::Stored<D>::Type*>(weights) + g * size;
        dq::Extremes e{0.0f, 0.0f, true};
        for (int lane = 0; lane < lanes; ++lane) e = dq::merge(e, dq::extremes_of_lane<D>(group, size, lane, lanes));
        const float span = dq::span_of(e.low, e.high, grid);
        scales[g] = dq::scale_of(span, grid);
        const float scale = dq::value_of(scales[g], grid), zero = dq::zero_of(e.low, scale, grid);
        zeros[g] = static_cast<uint8_t>(zero);
        problem |= !e.finite ? 2 : dq::overflows(span, grid) ? 1 : 0;
        for (int lane = 0; lane < lanes; ++lane) {
            dq::codes_of_lane<D>(group, size, lane, lanes, scale, zero, grid, codes + g * size);
        }
    }
    return problem;
}

}  // namespace

#define DQ_EACH_WIDTH(DO) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8)

extern "C" void host_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint32_t* packed) {
#define DQ_DO(B) \
    if (bits == B) pack<B>(codes, n, k, packed);
    DQ_EACH_WIDTH(DQ_DO)
#undef DQ_DO
}

extern "C" void host_unpack(const uint32_t* packed, int64_t n, int64_t k, int bits, uint8_t* codes) {
#define DQ_DO(B) \
    if (bits == B) unpack<B>(packed, n, k, codes);
    DQ_EACH_WIDTH(DQ_DO)
#undef DQ_DO
}

extern "C" int64_t host_count_different(const uint32_t* a, const uint32_t* b, int64_t n, int64_t k, int bits) {
#define DQ_DO(B) \
    if (bits == B) return count_different<B>(a, b, n, k);
    DQ_EACH_WIDTH(DQ_DO)
#undef DQ_DO
    return -1;
}

extern "C" int host_fit(const void* weights, int dtype, int64_t groups, int64_t size, int lanes, int bits,
                        int symmetric, int scale_dtype, uint16_t* scales, uint8_t* zeros, uint8_t* codes) {
    const dq::Grid grid{bits, symmetric != 0, static_cast<dq::Dtype>(scale_dtype)};
    switch (dtype) {
        case dq::kFloat32: return fit<dq::kFloat32>(weights, groups, size, lanes, grid, scales, zeros, codes);
        case dq::kBfloat16: return fit<dq::kBfloat16>(weights, groups, size, lanes, grid, scales, zeros, codes);
        default: return fit<dq::kFloat16>(weights, groups, size, lanes, grid, scales, zeros, codes);
    }
}

// Packs, unpacks and compares codes on the GPU: a thread takes a block of 32 codes (bits.cuh) and waits for nobody.
//
// The entry points take addresses in the memory of device `device` and a cudaStream_t, launch, and return the launch's
// cudaError_t without waiting. dq_runtime/backends/cuda_pack.py vouches for dtypes, shapes and contiguity.

#include "bits.cuh"
#include "launch.cuh"

namespace dq {
namespace {

template <int Bits>
__global__ void __launch_bounds__(kThreads)
    pack(const uint8_t* __restrict__ codes, int64_t blocks, int64_t k, int64_t row_words, uint32_t* __restrict__ packed) {
    const int64_t index = thread_index();
    if (index < blocks) pack_block<Bits>(index, codes, k, row_words, packed);
}

template <int Bits>
__global__ void __launch_bounds__(kThreads) unpack(const uint32_t* __restrict__ packed, int64_t blocks, int64_t k,
                                                   int64_t row_words, uint8_t* __restrict__ codes) {
    const int64_t index = thread_index();
    if (index < blocks) unpack_block<Bits>(index, packed, k, row_words, codes);
}

// One atomic addition a warp: integers, so the order of the warps changes nothing.
template <int Bits>
__global__ void __launch_bounds__(kThreads)
    count_different(const uint32_t* __restrict__ a, const uint32_t* __restrict__ b, int64_t blocks, int64_t k,
                    int64_t row_words, unsigned long long* count) {
    const int64_t index = thread_index();
    unsigned found = 0;
    if (index < blocks) found = different_in_block<Bits>(index, a, b, k, row_words);
    found = __reduce_add_sync(~0u, found);
    if (threadIdx.x % 32 == 0 && found != 0) atomicAdd(count, found);
}

// run.go<bits>()
template <typename Run>
int with_bits(int bits, Run run) {
    switch (bits) {
        case 2: return run.template go<2>();
        case 3: return run.template go<3>();
        case 4: return run.template go<4>();
        case 5: return run.template go<5>();
        case 6: return run.template go<6>();
        case 7: return run.template go<7>();
        case 8: return run.template go<8>();
        default: return cudaErrorInvalidValue;
    }
}

struct Shape {
    int64_t n, k;
    int bits, device;
    void* stream;

    int64_t blocks() const { return n * blocks_per_row(k); }
    int64_t row_words() const { return (k * bits + 31) / 32; }
};

struct Pack {
    const uint8_t* codes;
    uint32_t* packed;
    Shape s;

    template <int Bits>
    int go() const {
        return launched(s.blocks(), s.device, s.stream, [&](unsigned grid, cudaStream_t stream) {
            pack<Bits><<<grid, kThreads, 0, stream>>>(codes, s.blocks(), s.k, s.row_words(), packed);
        });
    }
};

struct Unpack {
    const uint32_t* packed;
    uint8_t* codes;
    Shape s;

    template <int Bits>
    int go() const {
        return launched(s.blocks(), s.device, s.stream, [&](unsigned grid, cudaStream_t stream) {
            unpack<Bits><<<grid, kThreads, 0, stream>>>(packed, s.blocks(), s.k, s.row_words(), codes);
        });
    }
};

struct CountDifferent {
    const uint32_t *a, *b;
    unsigned long long* count;
    Shape s;

    template <int Bits>
    int go() const {
        return launched(s.blocks(), s.device, s.stream, [&](unsigned grid, cudaStream_t stream) {
            count_different<Bits><<<grid, kThreads, 0, stream>>>(a, b, s.blocks(), s.k, s.row_words(), count);
        });
    }
};

}  // namespace
}  // namespace dq

// uint8 codes [N, K] -> int32 words [N, ceil(K*bits/32)].
DQ_API int dq_cuda_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint32_t* packed, int device,
                        void* stream) {
    return dq::with_bits(bits, dq::Pack{codes, packed, {n, k, bits, device, stream}});
}

// int32 words [N, ceil(K*bits/32)] -> uint8 codes [N, K].
DQ_API int dq_cuda_unpack(const uint32_t* packed, int64_t n, int64_t k, int bits, uint8_t* codes, int device,
                          void* stream) {
    return dq::with_bits(bits, dq::Unpack{packed, codes, {n, k, bits, device, stream}});
}

// Adds to *count the number of codes that differ between two packed tensors of the same shape.
DQ_API int dq_cuda_count_different(const uint32_t* a, const uint32_t* b, int64_t n, int64_t k, int bits,
                                   unsigned long long* count, int device, void* stream) {
    return dq::with_bits(bits, dq::CountDifferent{a, b, count, {n, k, bits, device, stream}});
}

// The runtime's sentence for an error code that one of the entry points returned.
DQ_API const char* dq_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

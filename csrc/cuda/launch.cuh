// What the entry points of csrc/cuda share: how work becomes a grid of threads, and what they return.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define DQ_API extern "C" __attribute__((visibility("default")))

namespace dq {

constexpr int kThreads = 256;  // a block

__device__ __forceinline__ int64_t thread_index() {
    return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

// Runs `launch(blocks, stream)` for `threads` threads on device `device`; nothing for none. The runtime linked into this
// library is not torch's, so the device is set here as well; both use its one primary context.
template <typename Launch>
int launched(int64_t threads, int device, void* stream, Launch launch) {
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    if (threads < 0 || blocks > 0x7fffffff) return cudaErrorInvalidValue;
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess || threads == 0) return error;
    launch(static_cast<unsigned>(blocks), static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
}

}  // namespace dq

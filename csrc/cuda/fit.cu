// Scales, zero points and nearest codes in one launch: int_grid.py's absmax rule (grid.cuh) on the GPU.
//
// A team of 1 to 32 lanes of one warp takes a group: each lane reads 16 bytes at a time, the extremes meet by shuffles
// (minima and maxima, so the order changes nothing), then every lane writes the codes of what it read. The second read
// is from the cache: device memory is read once, and what is written is the codes and the scales.

#include "grid.cuh"
#include "launch.cuh"

namespace dq {
namespace {

// Bits of *problem.
constexpr int kOverflow = 1;   // a group needs a scale that the scale dtype cannot hold
constexpr int kNotFinite = 2;  // a weight is infinite or NaN

template <Dtype D>
__global__ void __launch_bounds__(kThreads)
    fit(const typename Stored<D>::Type* __restrict__ weights, int64_t groups, int64_t size, int log_lanes, Grid grid,
        uint16_t* __restrict__ scales, uint8_t* __restrict__ zeros, uint8_t* __restrict__ codes, int* problem) {
    const int lanes = 1 << log_lanes;
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    const int64_t group = thread_index() >> log_lanes;
    const bool inside = group < groups;
    const auto* mine = weights + group * size;
    Extremes e{0.0f, 0.0f, true};
    if (inside) e = extremes_of_lane<D>(mine, size, lane, lanes);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {  // the whole warp shuffles, teams outside included
        e = merge(e, {__shfl_xor_sync(~0u, e.low, distance), __shfl_xor_sync(~0u, e.high, distance),
                      __shfl_xor_sync(~0u, static_cast<int>(e.finite), distance) != 0});
    }
    if (!inside) return;
    const float span = span_of(e.low, e.high, grid);
    const uint16_t stored = scale_of(span, grid);
    const float scale = value_of(stored, grid);
    const float zero = zero_of(e.low, scale, grid);
    if (lane == 0) {
        scales[group] = stored;
        if (!grid.symmetric) zeros[group] = static_cast<uint8_t>(zero);
        if (!e.finite) {
            atomicOr(problem, kNotFinite);
        } else if (overflows(span, grid)) {
            atomicOr(problem, kOverflow);
        }
    }
    codes_of_lane<D>(mine, size, lane, lanes, scale, zero, grid, codes + group * size);
}

template <Dtype D>
int fit_all(const void* weights, int64_t groups, int64_t size, Grid grid, uint16_t* scales, uint8_t* zeros,
            uint8_t* codes, int* problem, int device, void* stream) {
    int log_lanes = 0;
    while (log_lanes < 5 && (static_cast<int64_t>(Stored<D>::kChunk) << log_lanes) < size) ++log_lanes;
    return launched(groups << log_lanes, device, stream, [&](unsigned blocks, cudaStream_t s) {
        fit<D><<<blocks, kThreads, 0, s>>>(static_cast<const typename Stored<D>::Type*>(weights), groups, size,
                                           log_lanes, grid, scales, zeros, codes, problem);
    });
}

}  // namespace
}  // namespace dq

// Weights of `dtype` (dq::Dtype) in `groups` consecutive groups of `size` -> scales (bf16 or fp16) and, if not
// symmetric, zeros (uint8), one a group; codes, one a weight. Bits of *problem are set where a group has none.
DQ_API int dq_cuda_fit(const void* weights, int dtype, int64_t groups, int64_t size, int bits, int symmetric,
                       int scale_dtype, uint16_t* scales, uint8_t* zeros, uint8_t* codes, int* problem, int device,
                       void* stream) {
    if (bits < 2 || bits > 8 || size < 1) return cudaErrorInvalidValue;
    if (scale_dtype != dq::kBfloat16 && scale_dtype != dq::kFloat16) return cudaErrorInvalidValue;
    const dq::Grid grid{bits, symmetric != 0, static_cast<dq::Dtype>(scale_dtype)};
    const auto run = [&](auto fit_all) {
        return fit_all(weights, groups, size, grid, scales, zeros, codes, problem, device, stream);
    };
    switch (dtype) {
        case dq::kFloat32: return run(dq::fit_all<dq::kFloat32>);
        case dq::kBfloat16: return run(dq::fit_all<dq::kBfloat16>);
        case dq::kFloat16: return run(dq::fit_all<dq::kFloat16>);
        default: return cudaErrorInvalidValue;
    }
}

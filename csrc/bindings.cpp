// dq_runtime._native: the kernels under csrc/ as plain Python functions. No torch header: tensors arrive as addresses
// (Tensor.data_ptr()), and the caller, dq_runtime/backends/cpu_native.py, vouches for dtypes, shapes and contiguity.
// What can be checked without them is checked here.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/pool.h"
#include "cpu/qmm_scalar.h"
#include "layout.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace py = pybind11;

namespace {

// Multiply-adds below which a second thread costs more than it saves: a wake-up is about 10 us, a thread does about
// 2^15 of them in that time.
constexpr int64_t kWorkPerThread = 1 << 15;

template <typename T>
T* address(uintptr_t value, const char* name) {
    if (value == 0) throw py::value_error(std::string(name) + " is a null pointer");
    if (value % alignof(T) != 0) {
        throw py::value_error(std::string(name) + " is not aligned to " + std::to_string(alignof(T)) + " bytes");
    }
    return reinterpret_cast<T*>(value);
}

void positive(int64_t value, const char* name) {
    if (value <= 0) throw py::value_error(std::string(name) + " must be positive, got " + std::to_string(value));
}

void check_bits(int bits) {
    if (bits < 2 || bits > 8) throw py::value_error("bits must be from 2 to 8, got " + std::to_string(bits));
}

dq::Weight weight(uintptr_t packed, uintptr_t scale, bool scale_is_bf16, uintptr_t zero, int64_t n, int64_t k, int bits,
                  int64_t group_size) {
    check_bits(bits);
    positive(n, "N");
    positive(k, "K");
    positive(group_size, "group_size");
    if (k % group_size != 0) {
        throw py::value_error("group_size " + std::to_string(group_size) + " does not divide K " + std::to_string(k));
    }
    return {address<const int32_t>(packed, "packed_ptr"),
            address<const uint16_t>(scale, "scale_ptr"),
            scale_is_bf16,
            reinterpret_cast<const uint8_t*>(zero),  // 0: symmetric
            n,
            k,
            bits,
            group_size};
}

int useful_threads(int threads, int64_t rows, int64_t work_per_row) {
    const int64_t most = rows * work_per_row / kWorkPerThread + 1;
    return threads < most ? threads : static_cast<int>(most);
}

void qmm(uintptr_t x_ptr, int64_t m, uintptr_t packed_ptr, uintptr_t scale_ptr, bool scale_is_bf16, uintptr_t zero_ptr,
         int64_t n, int64_t k, int bits, int64_t group_size, uintptr_t y_ptr, int threads) {
    const dq::Weight w = weight(packed_ptr, scale_ptr, scale_is_bf16, zero_ptr, n, k, bits, group_size);
    positive(m, "M");
    const float* x = address<const float>(x_ptr, "x_ptr");
    float* y = address<float>(y_ptr, "y_ptr");
    py::gil_scoped_release release;
    dq::parallel_rows(n, useful_threads(threads, n, k * m), [&](int64_t begin, int64_t end) {
        dq::scalar::qmm_rows(w, x, m, y, begin, end);
    });
}

void dequantize(uintptr_t packed_ptr, uintptr_t scale_ptr, bool scale_is_bf16, uintptr_t zero_ptr, int64_t row_start,
                int64_t row_stop, int64_t k, int bits, int64_t group_size, uintptr_t out_ptr, int threads) {
    if (row_start < 0 || row_stop <= row_start) {
        throw py::value_error("rows " + std::to_string(row_start) + ":" + std::to_string(row_stop) + " are no range");
    }
    const dq::Weight w = weight(packed_ptr, scale_ptr, scale_is_bf16, zero_ptr, row_stop, k, bits, group_size);
    float* out = address<float>(out_ptr, "out_ptr");
    const int64_t rows = row_stop - row_start;
    py::gil_scoped_release release;
    dq::parallel_rows(rows, useful_threads(threads, rows, k), [&](int64_t begin, int64_t end) {
        dq::scalar::dequantize_rows(w, row_start + begin, row_start + end, out + begin * k);
    });
}

void pack(uintptr_t codes_ptr, int64_t n, int64_t k, int bits, uintptr_t out_ptr) {
    check_bits(bits);
    positive(n, "N");
    positive(k, "K");
    const uint8_t* codes = address<const uint8_t>(codes_ptr, "codes_ptr");
    int32_t* out = address<int32_t>(out_ptr, "out_ptr");
    py::gil_scoped_release release;
    dq::scalar::pack_rows(codes, k, bits, out, 0, n);
}

void unpack(uintptr_t packed_ptr, int64_t n, int64_t k, int bits, uintptr_t out_ptr) {
    check_bits(bits);
    positive(n, "N");
    positive(k, "K");
    const int32_t* packed = address<const int32_t>(packed_ptr, "packed_ptr");
    uint8_t* out = address<uint8_t>(out_ptr, "out_ptr");
    py::gil_scoped_release release;
    dq::scalar::unpack_rows(packed, k, bits, out, 0, n);
}

py::dict cpu_features() {
    py::dict f;
#if defined(__x86_64__)
    // CPUID and, for the wide registers, XGETBV: the operating system must save them too.
    __builtin_cpu_init();
    f["avx2"] = __builtin_cpu_supports("avx2") != 0;
    f["fma"] = __builtin_cpu_supports("fma") != 0;
    f["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
    f["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
    f["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
    f["avx512_vbmi"] = __builtin_cpu_supports("avx512vbmi") != 0;
    f["avx512_vnni"] = __builtin_cpu_supports("avx512vnni") != 0;
#else
    for (const char* name : {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vnni"}) {
        f[name] = false;
    }
#endif
#if defined(__aarch64__) && defined(__linux__)
    // Bit numbers of the kernel's asm/hwcap.h, which older systems lack names for.
    const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
    f["neon"] = (hwcap >> 1 & 1) != 0;
    f["dotprod"] = (hwcap >> 20 & 1) != 0;
    f["sve"] = (hwcap >> 22 & 1) != 0;
    f["i8mm"] = (hwcap2 >> 13 & 1) != 0;
#elif defined(__aarch64__)
    f["neon"] = true;  // part of the architecture
    for (const char* name : {"dotprod", "sve", "i8mm"}) f[name] = false;
#else
    for (const char* name : {"neon", "dotprod", "sve", "i8mm"}) f[name] = false;
#endif
    py::list variants;  // setup.py defines DQ_HAVE_<VARIANT> for every instruction-set file it compiled
#ifdef DQ_HAVE_SCALAR
    variants.append("scalar");
#endif
    f["variants"] = variants;
    return f;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    using py::arg;
    module.doc() = "CPU kernels on raw addresses. Use dq_runtime.backends, which checks tensors before they come here.";
    module.def("qmm", &qmm, arg("x_ptr"), arg("M"), arg("packed_ptr"), arg("scale_ptr"), arg("scale_is_bf16"),
               arg("zero_ptr"), arg("N"), arg("K"), arg("bits"), arg("group_size"), arg("y_ptr"), arg("threads"),
               "y float32 [M, N] = x float32 [M, K] @ (scale * (code - zero)).T; packed int32 [N, ceil(K*bits/32)], "
               "scale [N, K/group_size], zero uint8 [N, K/group_size] or 0 for 2^(bits-1). Same y for any `threads`.");
    module.def("dequantize", &dequantize, arg("packed_ptr"), arg("scale_ptr"), arg("scale_is_bf16"), arg("zero_ptr"),
               arg("row_start"), arg("row_stop"), arg("K"), arg("bits"), arg("group_size"), arg("out_ptr"),
               arg("threads"),
               "out float32 [row_stop - row_start, K] = scale * (code - zero) of those rows; the other pointers are to "
               "row 0.");
    module.def("pack", &pack, arg("codes_ptr"), arg("N"), arg("K"), arg("bits"), arg("out_ptr"),
               "uint8 codes [N, K], each < 2^bits -> int32 [N, ceil(K*bits/32)].");
    module.def("unpack", &unpack, arg("packed_ptr"), arg("N"), arg("K"), arg("bits"), arg("out_ptr"),
               "int32 [N, ceil(K*bits/32)] -> uint8 codes [N, K].");
    module.def("cpu_features", &cpu_features,
               "What this CPU offers (bools by name) and, under 'variants', the instruction sets compiled in.");
    py::module_::import("atexit").attr("register")(py::cpp_function([] {
        py::gil_scoped_release release;
        dq::shut_down_pool();
    }));
}

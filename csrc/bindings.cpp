// dq_runtime._native: the kernels under csrc/ as plain Python functions. No torch header: tensors arrive as addresses
// (Tensor.data_ptr()), and the caller, dq_runtime/backends/cpu_native.py, vouches for dtypes, shapes and contiguity.
// What can be checked without them is checked here.

#include <string>

#include "bindings.h"
#include "cpu/cpu_features.h"
#include "cpu/pool.h"
#include "cpu/qmm_scalar.h"
#include "layout.h"

namespace {

namespace py = pybind11;
using namespace dq::binding;

dq::Weight weight(uintptr_t packed, uintptr_t scale, bool scale_is_bf16, uintptr_t zero, int64_t n, int64_t k, int bits,
                  int64_t group_size, uintptr_t levels) {
    check_bits(bits);
    if (levels != 0 && bits != 4) throw py::value_error("a table of levels has 16, so codes of 4 bits");
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
            group_size,
            reinterpret_cast<const float*>(levels)};  // 0: evenly spaced
}

void qmm(uintptr_t x_ptr, int64_t m, uintptr_t packed_ptr, uintptr_t scale_ptr, bool scale_is_bf16, uintptr_t zero_ptr,
         int64_t n, int64_t k, int bits, int64_t group_size, uintptr_t y_ptr, int threads, uintptr_t levels_ptr) {
    const dq::Weight w = weight(packed_ptr, scale_ptr, scale_is_bf16, zero_ptr, n, k, bits, group_size, levels_ptr);
    positive(m, "M");
    const float* x = address<const float>(x_ptr, "x_ptr");
    float* y = address<float>(y_ptr, "y_ptr");
    py::gil_scoped_release release;
    dq::parallel_rows(n, useful_threads(threads, n, k * m), [&](int64_t begin, int64_t end) {
        dq::scalar::qmm_rows(w, x, m, y, begin, end);
    });
}

void dequantize(uintptr_t packed_ptr, uintptr_t scale_ptr, bool scale_is_bf16, uintptr_t zero_ptr, int64_t row_start,
                int64_t row_stop, int64_t k, int bits, int64_t group_size, uintptr_t out_ptr, int threads,
                uintptr_t levels_ptr) {
    if (row_start < 0 || row_stop <= row_start) {
        throw py::value_error("rows " + std::to_string(row_start) + ":" + std::to_string(row_stop) + " are no range");
    }
    const dq::Weight w = weight(packed_ptr, scale_ptr, scale_is_bf16, zero_ptr, row_stop, k, bits, group_size, levels_ptr);
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
    const dq::Features found = dq::features();
    py::dict f;
    f["avx2"] = found.avx2;
    f["fma"] = found.fma;
    f["avx512f"] = found.avx512f;
    f["avx512bw"] = found.avx512bw;
    f["avx512vl"] = found.avx512vl;
    f["avx512dq"] = found.avx512dq;
    f["avx512_vnni"] = found.avx512_vnni;
    f["amx_int8"] = found.amx_int8 && dq::tiles_permitted();
    f["amx_bf16"] = found.amx_bf16 && dq::tiles_permitted();
    f["neon"] = found.neon;
    f["dotprod"] = found.dotprod;
    f["sve"] = found.sve;
    f["i8mm"] = found.i8mm;
    py::list variants;  // setup.py defines DQ_HAVE_<VARIANT> for every instruction-set file it compiled
#ifdef DQ_HAVE_SCALAR
    variants.append("scalar");
#endif
#ifdef DQ_HAVE_AVX2
    variants.append("avx2");
#endif
#ifdef DQ_HAVE_AVX512
    variants.append("avx512");
#endif
#ifdef DQ_HAVE_AMX
    variants.append("amx");
#endif
#ifdef DQ_HAVE_NEON
    variants.append("neon");
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
               arg("levels_ptr") = 0,
               "y float32 [M, N] = x float32 [M, K] @ (scale * (code - zero)).T; packed int32 [N, ceil(K*bits/32)], "
               "scale [N, K/group_size], zero uint8 [N, K/group_size] or 0 for 2^(bits-1). With levels_ptr, float32 [16], "
               "the value is scale * levels[code]. Same y for any `threads`.");
    module.def("dequantize", &dequantize, arg("packed_ptr"), arg("scale_ptr"), arg("scale_is_bf16"), arg("zero_ptr"),
               arg("row_start"), arg("row_stop"), arg("K"), arg("bits"), arg("group_size"), arg("out_ptr"),
               arg("threads"), arg("levels_ptr") = 0,
               "out float32 [row_stop - row_start, K] = scale * (code - zero) of those rows; the other pointers are to "
               "row 0.");
    module.def("pack", &pack, arg("codes_ptr"), arg("N"), arg("K"), arg("bits"), arg("out_ptr"),
               "uint8 codes [N, K], each < 2^bits -> int32 [N, ceil(K*bits/32)].");
    module.def("unpack", &unpack, arg("packed_ptr"), arg("N"), arg("K"), arg("bits"), arg("out_ptr"),
               "int32 [N, ceil(K*bits/32)] -> uint8 codes [N, K].");
    module.def("cpu_features", &cpu_features,
               "What this CPU offers (bools by name) and, under 'variants', the instruction sets compiled in.");
    bind_prepared(module);
    bind_decoder(module);
    bind_training(module);
    bind_layers(module);
    bind_rounding(module);
    py::module_::import("atexit").attr("register")(py::cpp_function([] {
        py::gil_scoped_release release;
        dq::shut_down_pool();
    }));
}

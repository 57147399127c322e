// Prepared weights from Python: their sizes, how they are filled, and x @ w.T. The caller owns every byte.

#include <algorithm>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cpu/repack.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dq::binding {
namespace {


Prepared shape_of(int64_t n, int64_t k, int64_t group, int storage) {
    positive(n, "N");
    positive(k, "K");
    positive(group, "group");
    if (k % group != 0) {
        throw py::value_error("group " + std::to_string(group) + " does not divide K " + std::to_string(k));
    }
    if (storage != 2 && storage != 3 && storage != 4 && storage != 6 && storage != 8 && storage != kFloat &&
        storage != kTable) {
        throw py::value_error("storage must be 2, 3, 4, 6, 8, 16 or 20, got " + std::to_string(storage));
    }
    // One int32 sum a group: 2^31 / (255 * 127) columns.
    if (storage != kFloat && group > 66000) throw py::value_error("group must be at most 66000, got " + std::to_string(group));
    Prepared w{};
    w.n = n;
    w.k = k;
    w.group = group;
    w.groups = k / group;
    const int64_t unit = storage == kFloat ? 4 : 4 * quads_per_unit(storage);
    w.padded = (group + unit - 1) / unit * unit;
    w.storage = storage;
    return w;
}

Prepared prepared(uintptr_t codes, uintptr_t scale, uintptr_t zero, int64_t n, int64_t k, int64_t group, int storage,
                  int middle, bool is_bf16, uintptr_t rest, const std::vector<float>& levels,
                  const std::vector<int>& level_bytes, float level_step) {
    Prepared w = shape_of(n, k, group, storage);
    w.codes = address<const uint8_t>(codes, "codes_ptr", 64);
    if (storage != kFloat) w.scale = address<const uint16_t>(scale, "scale_ptr");
    w.zero = reinterpret_cast<const uint8_t*>(zero);
    w.middle = middle;
    w.is_bf16 = is_bf16;
    const size_t count = storage == kTable ? 16 : 0;
    if (levels.size() != count || level_bytes.size() != count || (count && zero != 0)) {
        throw py::value_error("storage 20 takes 16 levels, their 16 bytes and no zero points; others take no levels");
    }
    for (size_t i = 0; i < count; ++i) {
        if (level_bytes[i] < 0 || level_bytes[i] > 255) throw py::value_error("a level's byte must be 0 to 255");
        w.levels.values[i] = levels[i];
        w.levels.bytes[i] = static_cast<uint8_t>(level_bytes[i]);
    }
    w.levels.step = level_step;
    w.rest = reinterpret_cast<uint8_t*>(rest);
    if (w.rest && (storage != 6 || group != 32 || k % 64 != 0 || middle != 32 || zero || !is_bf16)) {
        throw py::value_error("two planes need storage 6, groups of 32, K a multiple of 64, middle 32 and bfloat16 scales");
    }
    return w;
}

Target target(const Prepared& w, int64_t n, int64_t first, int64_t step) {
    positive(n, "n");
    positive(step, "step");
    const int64_t last = first + ((n + kRows - 1) / kRows - 1) * step;
    if (first < 0 || last >= w.blocks()) {
        throw py::value_error("blocks " + std::to_string(first) + " to " + std::to_string(last) + " do not fit " +
                              std::to_string(w.blocks()));
    }
    return {w, const_cast<uint8_t*>(w.codes), const_cast<uint16_t*>(w.scale), const_cast<uint8_t*>(w.zero), first, step};
}

void repack_packed(const Prepared& w, int64_t first, int64_t step, uintptr_t packed, uintptr_t scale, uintptr_t zero,
                   int64_t n, int bits, int64_t group_size, int threads) {
    check_bits(bits);
    positive(group_size, "group_size");
    if (w.storage == kFloat || bits > w.storage || (w.storage == kTable && bits != 4)) {
        throw py::value_error(std::to_string(bits) + " bits do not fit storage " + std::to_string(w.storage));
    }
    if (group_size % w.group != 0 || w.k % group_size != 0) {
        throw py::value_error("group_size " + std::to_string(group_size) + " must divide K " + std::to_string(w.k) +
                              " and be a multiple of the group " + std::to_string(w.group));
    }
    if (w.storage == kTable ? zero != 0 : w.zero == nullptr && (zero != 0 || w.middle != 1 << (bits - 1))) {
        throw py::value_error("these weights need zero points of their own");
    }
    const PackedSource source{address<const int32_t>(packed, "packed_ptr"), address<const uint16_t>(scale, "scale_ptr"),
                              reinterpret_cast<const uint8_t*>(zero), n, bits, group_size};
    const Target to = target(w, n, first, step);
    py::gil_scoped_release release;
    repack(source, to, threads);
}

void repack_float(const Prepared& w, int64_t first, int64_t step, uintptr_t values, int type, int64_t n, int threads) {
    if (type < 0 || type > 2) throw py::value_error("type must be 0, 1 or 2, got " + std::to_string(type));
    const FloatType kind = static_cast<FloatType>(type);
    const bool is_bf16 = kind == FloatType::kBfloat16;
    if (w.storage == kFloat ? kind == FloatType::kFloat32 || is_bf16 != w.is_bf16 || w.groups != 1
                            : !w.rest && (w.storage != 8 || w.middle != 128 || w.zero || !w.is_bf16)) {
        throw py::value_error("floats go into storage 8 (middle 128, bfloat16 scales), two planes or, 16-bit ones, storage 16");
    }
    const FloatSource source{address<const void>(values, "values_ptr", kind == FloatType::kFloat32 ? 4 : 2), kind, n};
    const Target to = target(w, n, first, step);
    py::gil_scoped_release release;
    repack(source, to, threads);
}

void qmm_prepared(const Prepared& w, uintptr_t x_ptr, int64_t m, uintptr_t y_ptr, int threads, bool exact,
                  bool prompt) {
    positive(m, "M");
    if (w.storage == kFloat && !exact) throw py::value_error("unquantized weights run in exact mode only");
    struct Call {
        const Prepared& w;
        const Kernels& k;
        const float* x;
        float* y;
        int64_t m;
        bool exact, prompt;
        Activations a;
        unsigned char* scratch;
        int64_t scratch_stride;
    };
    const Kernels& k = kernels();  // throws where DQ_ISA asks for what there is not
    Call call{w, k, address<const float>(x_ptr, "x_ptr"), address<float>(y_ptr, "y_ptr"), m, exact,
              prompt && k.round != nullptr, {}, nullptr, 0};
    py::gil_scoped_release release;
    // A buffer per Python thread, kept: fresh pages cost as much as a small matmul.
    thread_local std::vector<unsigned char> buffer;
    threads = std::max(1, std::min(useful_threads(threads, w.n, w.k * m), kMaxThreads));
    const int64_t head = (place_activations(w, m, exact, nullptr, &call.a) + 63) / 64 * 64;
    call.scratch_stride = m <= kFewTokens && !call.prompt ? 0 : (scratch_bytes(w, exact) + 63) / 64 * 64;
    const size_t needed = static_cast<size_t>(head + threads * call.scratch_stride + 64);
    if (buffer.size() < needed) buffer.resize(needed);
    auto* base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
    place_activations(w, m, exact, base, &call.a);
    call.scratch = base + head;
    run_job({2,
             [](void* p, int phase) {
                 const Call& c = *static_cast<Call*>(p);
                 return phase == 0 ? c.m : (c.w.blocks() + 1) / 2;
             },
             [](void* p, int phase, int64_t begin, int64_t end, int thread) {
                 const Call& c = *static_cast<Call*>(p);
                 if (phase == 0 && c.exact) return c.k.pad(c.w, c.x, c.w.k, c.a, begin, end);
                 if (phase == 0 && c.prompt) return c.k.round(c.w, c.x, c.w.k, c.a, begin, end);
                 if (phase == 0) return c.k.quantize(c.w, c.x, c.w.k, c.m <= kFineTokens, c.a, begin, end);
                 const Output out{c.y, c.w.n, c.w.n, nullptr, Epilogue::kStore};
                 const Tile tile{0, c.m, 2 * begin, std::min(2 * end, c.w.blocks()), c.scratch + thread * c.scratch_stride};
                 (c.exact ? c.k.matmul_exact : c.k.matmul_int8)(c.w, c.a, out, tile);
             },
             &call},
            threads);
}

}  // namespace

void bind_prepared(py::module_& module) {
    using py::arg;
    py::class_<Prepared>(module, "Prepared", "One linear's weight in the kernels' order; see csrc/cpu/prepared.h.")
        .def(py::init(&prepared), arg("codes_ptr"), arg("scale_ptr"), arg("zero_ptr"), arg("N"), arg("K"), arg("group"),
             arg("storage"), arg("middle"), arg("is_bf16"), arg("rest_ptr") = 0, arg("levels") = std::vector<float>{},
             arg("level_bytes") = std::vector<int>{}, arg("level_step") = 1.0f);
    module.def("storage_of", &storage_of, arg("bits"), arg("group"),
               "2, 3, 4, 6 or 8: what stores such codes in the fewest bytes.");
    module.def(
        "prepared_sizes",
        [](int64_t n, int64_t k, int64_t group, int storage) {
            const Prepared w = shape_of(n, k, group, storage);
            return py::make_tuple(w.blocks() * w.block_bytes(), w.blocks() * w.groups * kRows);
        },
        arg("N"), arg("K"), arg("group"), arg("storage"), "Bytes of codes, and how many scales (and zero points).");
    module.def("repack_packed", &repack_packed, arg("target"), arg("first"), arg("step"), arg("packed_ptr"),
               arg("scale_ptr"), arg("zero_ptr"), arg("n"), arg("bits"), arg("group_size"), arg("threads"),
               "n canonical rows into blocks first, first + step, ... of the target.");
    module.def("repack_float", &repack_float, arg("target"), arg("first"), arg("step"), arg("values_ptr"), arg("type"),
               arg("n"), arg("threads"),
               "n rows of floats (type 0 float32, 1 bfloat16, 2 float16): quantized to 8 bits, in one plane or two, or kept as they are.");
    module.def("qmm_prepared", &qmm_prepared, arg("w"), arg("x_ptr"), arg("M"), arg("y_ptr"), arg("threads"),
               arg("exact"), arg("prompt"),
               "y float32 [M, N] = x float32 [M, K] @ w.T, activations int8 per group or exact; those of a prompt in bfloat16 "
               "instead of int8 where the instruction set multiplies that.");
    module.def(
        "advise_huge",
        [](uintptr_t start, int64_t bytes) {
#if defined(__linux__)
            // Advice only: where the system says no, the pages stay small and everything works.
            madvise(address<void>(start, "start", 4096), static_cast<size_t>(bytes), MADV_HUGEPAGE);
#else
            (void)start, (void)bytes;
#endif
        },
        arg("start"), arg("bytes"), "Asks for huge pages behind an aligned range that nothing has touched yet.");
    module.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
}

}  // namespace dq::binding

// Shared by the files that bind csrc/ to Python: checks of what can be checked on raw addresses and sizes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/training.h"

namespace dq::binding {

namespace py = pybind11;

template <typename T>
T* address(uintptr_t value, const char* name, size_t alignment = alignof(T)) {
    if (value == 0) throw py::value_error(std::string(name) + " is a null pointer");
    if (value % alignment != 0) {
        throw py::value_error(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
    }
    return reinterpret_cast<T*>(value);
}

// The address of 16-bit or 32-bit floats.
inline void* floats(uintptr_t value, const char* name, bool half) {
    return half ? static_cast<void*>(address<uint16_t>(value, name)) : address<float>(value, name);
}

inline void positive(int64_t value, const char* name) {
    if (value <= 0) throw py::value_error(std::string(name) + " must be positive, got " + std::to_string(value));
}

// 16-bit scales at an address, one for group_size of the k columns.
inline GroupScales group_scales(uintptr_t values, bool bf16, int64_t n, int64_t k, int64_t group_size) {
    positive(n, "N");
    positive(k, "K");
    positive(group_size, "group_size");
    if (k % group_size != 0) throw py::value_error("group_size must divide K");
    return {address<const uint16_t>(values, "scale"), bf16, n, k, group_size};
}

inline void check_bits(int bits) {
    if (bits < 2 || bits > 8) throw py::value_error("bits must be from 2 to 8, got " + std::to_string(bits));
}

// Multiply-adds below which a second thread costs more than it saves: a wake-up is about 10 us, a thread does about
// 2^15 of them in that time.
inline int useful_threads(int threads, int64_t rows, int64_t work_per_row) {
    const int64_t most = rows * work_per_row / (1 << 15) + 1;
    return threads < most ? threads : static_cast<int>(most);
}

void bind_prepared(py::module_& module);  // repacking and the matmuls over it
void bind_decoder(py::module_& module);
void bind_training(py::module_& module);
void bind_layers(py::module_& module);  // what stands between the products of a layer in training
void bind_rounding(py::module_& module);

}  // namespace dq::binding

// The kernels of one instruction set against the scalar contract, as a program of its own: tests/unit/test_cross.py
// compiles it for machines whose Python is not at hand and runs it on an emulator. Prints a line for each kernel that
// is off and a summary; exit status 1 if any is.
//
// Compile with -DISA=kNeonKernels (or another table of kernels.h) and -DDQ_HAVE_NEON.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/repack.h"

namespace {

using namespace dq;

std::mt19937 dice{7};
int checks = 0, failures = 0;

std::vector<float> uniform(int64_t count, float low, float high) {
    std::uniform_real_distribution<float> pick(low, high);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = pick(dice);
    return values;
}

template <typename T>
std::vector<T> integers(int64_t count, int low, int high) {
    std::uniform_int_distribution<int> pick(low, high);
    std::vector<T> values(static_cast<size_t>(count));
    for (T& value : values) value = static_cast<T>(pick(dice));
    return values;
}

// 64-byte aligned bytes, all 0xA5: what a kernel forgets to write shows.
struct Bytes {
    std::unique_ptr<unsigned char, void (*)(void*)> memory;
    explicit Bytes(int64_t size) : memory(nullptr, std::free) {
        const size_t whole = (static_cast<size_t>(size) + 127) / 64 * 64;
        memory.reset(static_cast<unsigned char*>(std::aligned_alloc(64, whole)));
        std::memset(memory.get(), 0xA5, whole);
    }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(memory.get());
    }
};

// Every element within `bound` of the largest magnitude expected; a NaN is off.
void compare(const char* what, const std::vector<float>& found, const std::vector<float>& expected, float bound) {
    float size = 0, worst = 0;
    for (const float value : expected) size = std::fmax(size, std::fabs(value));
    for (size_t i = 0; i < found.size(); ++i) {
        const float off = std::fabs(found[i] - expected[i]);
        worst = off <= worst ? worst : off;
    }
    ++checks;
    if (worst <= bound * size) return;
    ++failures;
    std::printf("%s: off by %g of %g\n", what, static_cast<double>(worst), static_cast<double>(size));
}

std::vector<float> product(const Kernels& kernels, const Prepared& w, const std::vector<float>& x, bool exact) {
    const int64_t m = static_cast<int64_t>(x.size()) / w.k;
    Activations a;
    const Bytes room(place_activations(w, m, exact, nullptr, &a)), scratch(scratch_bytes(w, exact));
    place_activations(w, m, exact, room.as<unsigned char>(), &a);
    if (exact) {
        kernels.pad(w, x.data(), w.k, a, 0, m);
    } else {
        kernels.quantize(w, x.data(), w.k, m <= kFineTokens, a, 0, m);
    }
    std::vector<float> y(static_cast<size_t>(m * w.n), NAN);
    (exact ? kernels.matmul_exact : kernels.matmul_int8)(w, a, {y.data(), w.n, w.n, nullptr, Epilogue::kStore},
                                                         {0, m, 0, w.blocks(), scratch.as<void>()});
    return y;
}

void check_matmul(int bits, int64_t group, bool symmetric, bool bf16) {
    const int64_t n = 67, k = group == 100 ? 100 : 192, words = (k * bits + 31) / 32;
    Prepared w{};
    w.n = n, w.k = k, w.group = group, w.groups = k / group, w.storage = storage_of(bits, group);
    w.middle = 1 << (bits - 1), w.is_bf16 = bf16;
    const int64_t unit = 4 * quads_per_unit(w.storage);
    w.padded = (group + unit - 1) / unit * unit;
    const Bytes codes(w.blocks() * w.block_bytes()), scale(w.blocks() * w.groups * 32), zero(w.blocks() * w.groups * 16);
    w.codes = codes.as<uint8_t>(), w.scale = scale.as<uint16_t>(), w.zero = symmetric ? nullptr : zero.as<uint8_t>();
    const auto packed = integers<int32_t>(n * words, INT32_MIN, INT32_MAX);
    const auto scales = integers<uint16_t>(n * w.groups, bf16 ? 0x3C00 : 0x2400, bf16 ? 0x3CFF : 0x25FF);
    const auto zeros = integers<uint8_t>(n * w.groups, 0, (1 << bits) - 1);
    repack({packed.data(), scales.data(), symmetric ? nullptr : zeros.data(), n, bits, group},
           {w, codes.as<uint8_t>(), scale.as<uint16_t>(), zero.as<uint8_t>(), 0, 1}, 1);
    for (const int64_t m : {1, 2, 3, 15, 16, 17}) {
        auto x = uniform(m * k, -1, 1);
        x[5] *= 30;
        // Both sum 192 products in float32, in other orders: 192 * 2^-24.
        for (const bool exact : {false, true}) {
            compare(exact ? "matmul_exact" : "matmul_int8", product(ISA, w, x, exact),
                    product(kScalarKernels, w, x, exact), 1.2e-5f);
        }
    }
}

void check_head(int64_t n, int64_t k, float spread) {
    Prepared w{};
    w.n = n, w.k = k, w.group = 32, w.groups = k / 32, w.padded = 32, w.storage = 6, w.middle = 32, w.is_bf16 = true;
    const Bytes codes(w.blocks() * w.block_bytes()), scale(w.blocks() * w.groups * 32), rest(n * k / 4);
    w.codes = codes.as<uint8_t>(), w.scale = scale.as<uint16_t>(), w.rest = rest.as<uint8_t>();
    const auto values = uniform(n * k, -1, 1), x = uniform(k, -1, 1);
    repack({values.data(), FloatType::kFloat32, n}, {w, codes.as<uint8_t>(), scale.as<uint16_t>(), nullptr, 0, 1}, 1);
    const auto upper = uniform(n, -spread, spread);
    std::vector<float> results[2], rows[2];
    for (const Kernels* kernels : {&ISA, &kScalarKernels}) {
        std::vector<int32_t> chosen(static_cast<size_t>(most_refined(n) + 1));
        const int64_t count = kernels->choose(upper.data(), n, chosen.data());
        const int which = kernels == &kScalarKernels;
        results[which] = upper;
        kernels->refine(w, x.data(), chosen.data(), count, results[which].data());
        rows[which].assign(chosen.begin(), chosen.begin() + count);
        rows[which].push_back(static_cast<float>(count));
    }
    compare("choose", rows[0], rows[1], rows[0].size() == rows[1].size() ? 0.0f : -1.0f);
    compare("refine", results[0], results[1], 1e-5f);
}

void check_attention(int64_t dim, bool half, float softcap, int64_t window) {
    const int64_t positions = 200, tokens = 10, heads = 3, tiles = 4;
    const auto keys = uniform(positions * dim, -1, 1), values = uniform(positions * dim, -1, 1);
    const auto q = uniform(tokens * heads * dim, -1, 1);
    std::vector<float> results[2];
    for (const Kernels* kernels : {&ISA, &kScalarKernels}) {
        const int64_t stride = 128 * dim * (half ? 2 : 4);
        const Bytes room(tiles * stride);
        const int64_t order[] = {2, 0, 3, 1};
        const KeyValue cache{room.as<unsigned char>(), stride, order, tiles, dim, half};
        for (int64_t p = 0; p < positions; ++p) {
            kernels->store_key_value(keys.data() + p * dim, values.data() + p * dim, cache, p);
        }
        std::vector<float> out(q.size(), NAN), scratch(static_cast<size_t>(attend_scratch(dim)));
        std::vector<float> top(static_cast<size_t>(tokens * heads)), total(top.size());
        AttendUnit unit{};
        unit.q = q.data(), unit.out = out.data(), unit.token_stride = unit.out_stride = heads * dim;
        unit.tokens = tokens, unit.heads = heads, unit.position = positions - tokens, unit.window = window;
        unit.begin = 0, unit.end = INT64_MAX, unit.span = kScoreTile, unit.softcap = softcap, unit.cache = cache;
        unit.top = top.data(), unit.total = total.data(), unit.stat_stride = heads;
        unit.normalise = true, unit.scratch = scratch.data();
        kernels->attend(unit);
        results[kernels == &kScalarKernels] = out;
    }
    compare("attend", results[0], results[1], 2e-5f);  // 200 terms of exp, 2e-7 each, and their sums
}

void check_rows(int64_t n) {
    const auto x = uniform(n, -3, 3), y = uniform(n, -3, 3);
    std::vector<float> results[2][3];
    for (const Kernels* kernels : {&ISA, &kScalarKernels}) {
        auto& [norm, sum, turned] = results[kernels == &kScalarKernels];
        norm.assign(x.size(), NAN);
        kernels->rms_norm(x.data(), y.data(), norm.data(), n, 1e-5f);
        sum = turned = x;
        kernels->add(sum.data(), y.data(), n);
        kernels->rope(turned.data(), y.data(), x.data(), n / 2);
    }
    compare("rms_norm", results[0][0], results[1][0], 1e-5f);
    compare("add", results[0][1], results[1][1], 0);
    compare("rope", results[0][2], results[1][2], 1e-6f);
}

void check_training(int64_t n, int64_t k, int64_t group, bool bf16) {
    const auto lo = integers<uint8_t>(n * k, 0, 6), free = integers<uint8_t>(n * k, 0, 1);
    const auto zeros = integers<uint8_t>(n * k / group, 0, 7);
    const auto scales = integers<uint16_t>(n * k / group, 0x3C00, 0x3CFF);
    const auto x = uniform(n * k, 0, 1), y = uniform(n * k, 0, 1), v = uniform(n * k, 0, 1), grad = uniform(n * k, -1, 1);
    const auto halves = integers<uint16_t>(2 * n * k, 0x3F00, 0x4100);  // bfloat16 from 0.5 to 8
    const GroupScales scale{scales.data(), true, n, k, group};
    std::vector<float> results[2][6];
    for (const Kernels* kernels : {&ISA, &kScalarKernels}) {
        const TrainingKernels& training = kernels->training;
        auto& [weight, scaled, moved, m, kl, difference] = results[kernels == &kScalarKernels];
        weight.assign(x.size(), NAN), scaled.assign(x.size(), NAN), difference.assign(x.size(), NAN);
        std::vector<uint16_t> narrow(x.size(), 0x7FC0);
        const auto widen = [&](std::vector<float>& out) {
            for (size_t i = 0; i < out.size(); ++i) {
                const uint32_t bits = static_cast<uint32_t>(narrow[i]) << 16;
                std::memcpy(&out[i], &bits, 4);
            }
        };
        void* out = bf16 ? static_cast<void*>(narrow.data()) : weight.data();
        training.lerp_weight({scale, lo.data(), x.data(), zeros.data(), 4, out, bf16}, 0, n);
        if (bf16) widen(weight);
        const void* from = bf16 ? static_cast<const void*>(halves.data()) : grad.data();
        training.scale_grad({scale, from, bf16, scaled.data()}, 0, n);
        moved = x, m = grad;
        auto squares = v;
        training.adam({moved.data(), m.data(), squares.data(), grad.data(), y.data(), free.data()}, n * k,
                      {3, 0.5f, 0.9f, 0.999f, 1e-8f, 0.999f, 0.05f, 0.7f});
        const void* student = bf16 ? static_cast<const void*>(halves.data() + n * k) : grad.data();
        const void* teacher = bf16 ? static_cast<const void*>(halves.data()) : y.data();
        out = bf16 ? static_cast<void*>(narrow.data()) : difference.data();
        for (int64_t token = 0; token < n; ++token) {
            kl.push_back(static_cast<float>(training.token_kl({student, teacher, out, bf16, n, k}, token)));
        }
        if (bf16) widen(difference);
    }
    const char* names[] = {"lerp_weight", "scale_grad", "adam x", "adam m", "token_kl", "token_kl's gradient"};
    // The first two round the same operations; a float32 difference may tip the last rounding of a bfloat16.
    const float bounds[] = {0, 0, 1e-6f, 1e-6f, 1e-5f, bf16 ? 0.0079f : 1e-5f};
    for (int i = 0; i < 6; ++i) compare(names[i], results[0][i], results[1][i], bounds[i]);
}

template <typename T>
std::vector<float> widened(const std::vector<T>& values) {
    return {values.begin(), values.end()};
}

void check_latent(int64_t n, int64_t k, int64_t group, int bits, bool bf16) {
    const auto scales = integers<uint16_t>(n * k / group, 0x3C00, 0x3CFF);
    const auto zeros = integers<uint8_t>(n * k / group, 0, (1 << bits) - 1);
    const auto latents = integers<int16_t>(n * k, -32768, 32767);
    const auto shares = integers<int8_t>(n * k, -127, 127);
    const auto squares = integers<uint8_t>(n * k, 0, 255);
    const auto grad = uniform(n * k, -1, 1);
    const auto halves = integers<uint16_t>(n * k, 0x3A00, 0x3C00);
    const auto row = uniform(3 * n, 0, 1), column = uniform(3 * k, 0, 1);
    std::vector<float> results[2][5];
    for (const Kernels* kernels : {&ISA, &kScalarKernels}) {
        const LatentKernels& latent = kernels->latent;
        auto& [weight, largest, moved_u, moved_m, moved_v] = results[kernels == &kScalarKernels];
        weight.assign(latents.size(), NAN);
        std::vector<uint16_t> narrow(latents.size(), 0x7FC0);
        void* out = bf16 ? static_cast<void*>(narrow.data()) : weight.data();
        latent.weight({{scales.data(), true, n, k, group}, latents.data(), zeros.data(), bits, out, bf16}, 0, n);
        if (bf16) weight = widened(narrow);
        auto u = latents;
        auto m = shares;
        auto v = squares;
        const void* from = bf16 ? static_cast<const void*>(halves.data()) : grad.data();
        const LatentState state{n, k, u.data(), m.data(), v.data(), from, bf16, row.data(), column.data()};
        largest = {latent.largest(state, 0, n)};
        latent.step(state, {0.9f, 0.1f, 0.999f, 0.001f, 0.03f, 790, 791, 1.5f, 31.75f, 200}, 0, n);
        moved_u = widened(u), moved_m = widened(m), moved_v = widened(v);
    }
    // No sum, and each operation rounds as IEEE says: the same to the bit.
    const char* names[] = {"latent_weight", "latent_largest", "latent u", "latent m", "latent v"};
    for (int i = 0; i < 5; ++i) compare(names[i], results[0][i], results[1][i], 0);
}

}  // namespace

int main() {
    for (int bits = 2; bits <= 8; ++bits) {
        for (const int64_t group : {16, 32, 64, 100}) {
            for (const bool symmetric : {true, false}) check_matmul(bits, group, symmetric, bits % 2 == 0);
        }
    }
    for (const bool half : {true, false}) {
        check_attention(64, half, 0, 0);
        check_attention(80, half, 5, 70);
    }
    for (const int64_t n : {64, 576, 100}) check_rows(n);
    for (const int64_t n : {1, 67, 5003}) check_head(n, 192, 20), check_head(n, 64, 0.1f);
    for (const bool bf16 : {true, false}) {
        check_training(17, 576, 64, bf16);
        check_training(5, 33, 11, bf16);
        check_training(3, 7, 7, bf16);
        check_latent(17, 576, 64, 3, bf16);
        check_latent(5, 33, 11, 2, bf16);
        check_latent(3, 7, 7, 8, bf16);
    }
    std::printf("%s: %d checks, %d failures\n", ISA.name, checks, failures);
    return failures != 0;
}

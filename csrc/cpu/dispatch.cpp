// Which table of kernels this process uses: the best the CPU runs, or the one the environment variable DQ_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "kernels.h"

namespace dq {
namespace {

struct Choice {
    const char* name;
    const Kernels* kernels;  // nullptr: not compiled in
    const char* missing;     // nullptr: the CPU runs it
};

// Best first.
std::vector<Choice> choices() {
    const Features f = features();
    std::vector<Choice> found;
    const auto add = [&](const char* name, const Kernels* kernels, const char* missing) {
        found.push_back({name, kernels, missing});
    };
#ifdef DQ_HAVE_AMX
    const bool amx = f.avx512() && f.amx_int8 && f.amx_bf16 && tiles_permitted();
    add("amx", &amx_kernels(), amx ? nullptr : "AMX with 8-bit integers and bfloat16");
#else
    add("amx", nullptr, nullptr);
#endif
#ifdef DQ_HAVE_AVX512
    add("avx512", &kAvx512Kernels, f.avx512() ? nullptr : "AVX-512 F, BW, VL, DQ and VNNI");
#else
    add("avx512", nullptr, nullptr);
#endif
#ifdef DQ_HAVE_AVX2
    add("avx2", &kAvx2Kernels, f.avx2_fma_f16c() ? nullptr : "AVX2, FMA and F16C");
#else
    add("avx2", nullptr, nullptr);
#endif
#ifdef DQ_HAVE_NEON
    add("neon", &kNeonKernels, f.neon && f.dotprod ? nullptr : "NEON with dot products");
#else
    add("neon", nullptr, nullptr);
#endif
    add("scalar", &kScalarKernels, nullptr);
    return found;
}

const Kernels& choose() {
    const char* wanted = std::getenv("DQ_ISA");
    const bool any = wanted == nullptr || *wanted == '\0';
    std::string known;
    for (const Choice& choice : choices()) {
        known += known.empty() ? choice.name : std::string(", ") + choice.name;
        if (any && choice.kernels && !choice.missing) return *choice.kernels;
        if (any || std::string(wanted) != choice.name) continue;
        if (!choice.kernels) {
            throw std::runtime_error(std::string("DQ_ISA=") + wanted + ": these kernels were not compiled in");
        }
        if (choice.missing) {
            throw std::runtime_error(std::string("DQ_ISA=") + wanted + ": this CPU lacks " + choice.missing);
        }
        return *choice.kernels;
    }
    throw std::runtime_error(std::string("DQ_ISA=") + wanted + " is not an instruction set; known: " + known);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace dq

// What this CPU, and for the wide registers the operating system, offers.
#pragma once

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dq {

struct Features {
    bool avx2 = false, fma = false, f16c = false;
    bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false, avx512_vnni = false;
    bool neon = false, dotprod = false, sve = false, i8mm = false;

    bool avx2_fma_f16c() const { return avx2 && fma && f16c; }
    bool avx512() const { return avx2_fma_f16c() && avx512f && avx512bw && avx512vl && avx512dq && avx512_vnni; }
};

static inline Features features() {
    Features f;
#if defined(__x86_64__)
    // CPUID and, for the wide registers, XGETBV: the operating system must save them too.
    __builtin_cpu_init();
    f.avx2 = __builtin_cpu_supports("avx2") != 0;
    f.fma = __builtin_cpu_supports("fma") != 0;
    f.f16c = f.avx2 && f.fma;  // no CPU has both without it, and GCC 10 cannot ask
    f.avx512f = __builtin_cpu_supports("avx512f") != 0;
    f.avx512bw = __builtin_cpu_supports("avx512bw") != 0;
    f.avx512vl = __builtin_cpu_supports("avx512vl") != 0;
    f.avx512dq = __builtin_cpu_supports("avx512dq") != 0;
    f.avx512_vnni = __builtin_cpu_supports("avx512vnni") != 0;
#elif defined(__aarch64__) && defined(__linux__)
    // Bit numbers of the kernel's asm/hwcap.h, which older systems lack names for.
    const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
    f.neon = (hwcap >> 1 & 1) != 0;
    f.dotprod = (hwcap >> 20 & 1) != 0;
    f.sve = (hwcap >> 22 & 1) != 0;
    f.i8mm = (hwcap2 >> 13 & 1) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    f.neon = f.dotprod = true;  // every Apple CPU since 2018
#endif
    return f;
}

}  // namespace dq

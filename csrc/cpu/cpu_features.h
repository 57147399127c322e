// What this CPU, and for the wide registers the operating system, offers.
#pragma once

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dq {

struct Features {
    bool avx2 = false, fma = false, f16c = false;
    bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false, avx512_vnni = false;
    bool amx_int8 = false, amx_bf16 = false;  // the latter with AVX-512 BF16
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
    unsigned a = 0, b = 0, c = 0, d = 0;  // AMX-TILE, AMX-INT8 and AMX-BF16, which GCC 10 has no names for
    f.amx_int8 = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 3) == 3;
    f.amx_bf16 = (d >> 22 & 1) != 0 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 5 & 1) != 0;
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

// Asks the system for AMX's registers, which Linux (5.16 and later) gives to processes that ask, for all their threads.
static inline bool tiles_permitted() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace dq

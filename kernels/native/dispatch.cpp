#include "dispatch.h"

#include "sha256.h"

#if defined(__x86_64__) || defined(_M_X64)
#define SHARDQ_X86
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace shardq {

extern const Table baseline_table, avx2_table, avx512_table, neon_table;

#ifdef SHARDQ_X86
namespace {

struct Registers {
    uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf) {
    Registers r = {};
#if defined(_MSC_VER) && !defined(__clang__)
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), 0);
    r = {static_cast<uint32_t>(values[0]), static_cast<uint32_t>(values[1]), static_cast<uint32_t>(values[2]),
         static_cast<uint32_t>(values[3])};
#else
    __cpuid_count(leaf, 0, r.eax, r.ebx, r.ecx, r.edx);
#endif
    return r;
}

// Registers that the operating system saves: bit 1 SSE, 2 AVX, 5..7 AVX-512.
uint64_t saved_registers() {
#if defined(_MSC_VER) && !defined(__clang__)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

constexpr bool has_all(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

// x86-64-v3 and v4 as the psABI lists them, beyond SSE4.2 and POPCNT.
struct Levels {
    bool v3, v4;
};

Levels probe() {
    if (cpuid(0).eax < 7 || cpuid(0x80000000u).eax < 0x80000001u) return {false, false};
    const Registers basic = cpuid(1), extended = cpuid(7), amd = cpuid(0x80000001u);
    // FMA MOVBE POPCNT OSXSAVE AVX F16C
    constexpr uint32_t kBasic = 1u << 12 | 1u << 22 | 1u << 23 | 1u << 27 | 1u << 28 | 1u << 29;
    if (!has_all(basic.ecx, kBasic)) return {false, false};
    const uint64_t saved = saved_registers();
    const bool v3 = has_all(saved, 0x06) && has_all(extended.ebx, 1u << 3 | 1u << 5 | 1u << 8) &&  // BMI1 AVX2 BMI2
                    has_all(amd.ecx, 1u << 5);                                                     // LZCNT
    const bool v4 = v3 && has_all(saved, 0xe6) &&
                    has_all(extended.ebx, 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31);  // F DQ CD BW VL
    return {v3, v4};
}

}  // namespace

bool has_sha256() {
    if (cpuid(0).eax < 7) return false;
    return has_all(cpuid(1).ecx, 1u << 9 | 1u << 19) && has_all(cpuid(7).ebx, 1u << 29);  // SSSE3 SSE4.1, SHA
}
#endif

BuiltSets built_sets() {
#ifdef SHARDQ_X86
    static const Levels levels = probe();
    static const BuiltSet sets[] = {
        {&baseline_table, true, ""},
#ifdef SHARDQ_BUILD_AVX
        {&avx2_table, levels.v3, "it has no AVX2 with FMA, F16C and BMI (x86-64-v3)"},
        {&avx512_table, levels.v4, "it has no AVX-512 F, BW, CD, DQ and VL (x86-64-v4)"},
#endif
    };
#elif defined(__aarch64__) || defined(_M_ARM64)
    static const BuiltSet sets[] = {{&baseline_table, true, ""}, {&neon_table, true, ""}};
#else
    static const BuiltSet sets[] = {{&baseline_table, true, ""}};
#endif
    return {sets, static_cast<int>(sizeof sets / sizeof *sets)};
}

}  // namespace shardq

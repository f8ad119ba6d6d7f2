#include "dispatch.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const fa_kernel fa_float32_baseline, fa_float64_baseline;

#if defined(__x86_64__)
extern const fa_kernel fa_float32_avx2, fa_float64_avx2;
extern const fa_kernel fa_float32_avx512, fa_float64_avx512;
extern const fa_kernel fa_bf16dot_avx512bf16, fa_bf16tile_amx;

/* CPUID is read here because __builtin_cpu_supports answers 0 under some compilers' run-time
 * libraries; XGETBV, because the operating system must save the registers too. */
static bool os_saves(unsigned long long state)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((low | (unsigned long long)high << 32) & state) == state;
}

static bool has_avx2(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_FMA) || !(c & bit_F16C))
        return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2) && os_saves(0x06);
}

static bool has_avx512(void)
{
    unsigned a, b, c, d;
    const unsigned needed = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return has_avx2() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & needed) == needed && os_saves(0xe6);
}

static bool has_avx512bf16(void)
{
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
}

/* Linux gives a process the tile registers only when it asks. */
static bool may_use_tiles(void)
{
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* of asm/prctl.h, in recent kernels */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

static bool has_amx(void)
{
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d;
    return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
           os_saves(0x600e6) && may_use_tiles();
}
#endif

/* That of Zen 5. */
static bool is_amd_family_26(void)
{
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || c != signature_AMD_ecx ||
        d != signature_AMD_edx || !__get_cpuid(1, &a, &b, &c, &d))
        return false;
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff); /* base and, from 15 on, extended */
    return family == 26;
#else
    return false;
#endif
}

bool fa_prefetch_to_l1(void)
{
    static atomic_int answer = -1; /* CPUID is slow where a hypervisor answers it */
    int known = atomic_load_explicit(&answer, memory_order_relaxed);
    if (known < 0) {
        known = is_amd_family_26();
        atomic_store_explicit(&answer, known, memory_order_relaxed);
    }
    return known;
}

static bool has_baseline(void)
{
    return true;
}

/* The registry: best first. A dtype without a kernel of its own is computed in float32. */
static const struct {
    const char *isa;
    bool (*is_supported)(void);
    const fa_kernel *float32, *float64, *bfloat16;
} table[] = {
#if defined(__x86_64__)
    {"amx", has_amx, &fa_float32_avx512, &fa_float64_avx512, &fa_bf16tile_amx},
    {"avx512bf16", has_avx512bf16, &fa_float32_avx512, &fa_float64_avx512, &fa_bf16dot_avx512bf16},
    {"avx512", has_avx512, &fa_float32_avx512, &fa_float64_avx512, NULL},
    {"avx2", has_avx2, &fa_float32_avx2, &fa_float64_avx2, NULL},
#endif
    {"baseline", has_baseline, &fa_float32_baseline, &fa_float64_baseline, NULL},
};

enum { NUM_ISAS = sizeof table / sizeof *table };

static atomic_int selected = -1;

static int selected_row(void)
{
    int row = atomic_load(&selected);
    if (row >= 0)
        return row;
    for (row = 0; !table[row].is_supported(); row++)
        ;
    atomic_store(&selected, row);
    return row;
}

const char *fa_selected_isa(void)
{
    return table[selected_row()].isa;
}

const char *const *fa_available_isas(void)
{
    static const char *names[NUM_ISAS + 1];
    int count = 0;
    for (int row = 0; row < NUM_ISAS; row++)
        if (table[row].is_supported())
            names[count++] = table[row].isa;
    return names;
}

bool fa_select_isa(const char *name)
{
    for (int row = 0; row < NUM_ISAS; row++) {
        if (strcmp(table[row].isa, name) == 0 && table[row].is_supported()) {
            atomic_store(&selected, row);
            return true;
        }
    }
    return false;
}

const fa_kernel *fa_kernel_for_dtype(fa_dtype dtype)
{
    int row = selected_row();
    if (dtype == FA_FLOAT64)
        return table[row].float64;
    if (dtype == FA_BFLOAT16 && table[row].bfloat16)
        return table[row].bfloat16;
    return table[row].float32;
}

/* float32 queries keep their precision on bfloat16 keys, so the query decides; and int8 keys are exact in
 * float32, not in bfloat16 once they are scaled. */
const fa_kernel *fa_select_kernel(const fa_problem *problem)
{
    return fa_kernel_for_dtype(problem->key.dtype == FA_INT8 ? FA_FLOAT32 : problem->query.dtype);
}

/* The table of kernels: instruction set × precision. */
#include "dispatch.h"

#include <stdatomic.h>
#include <string.h>

#include "cpu.h"
#include "dtypes.h"

extern const fa_kernel fa_float32_baseline, fa_float64_baseline;

#if defined(__x86_64__)
extern const fa_kernel fa_float32_avx2, fa_float64_avx2;
extern const fa_kernel fa_float32_avx512, fa_float64_avx512;
extern const fa_kernel fa_bf16dot_avx512bf16, fa_bf16tile_amx, fa_bf16tile_amx_emulated;
extern const fa_kernel fa_split_amx, fa_split_amx_emulated;
#elif defined(__aarch64__)
extern const fa_kernel fa_float32_neon, fa_float64_neon, fa_bf16dot_neonbf16;
#endif

/* Best first. NULL: bfloat16 is computed in float32, as is every other dtype that has no column; float32 is
 * not split. Behind the baseline, which every CPU has: what is for tests, chosen by name alone and not
 * listed.
 *
 * CPUs with the tile unit issue dot products at a quarter of the rate of multiply-adds (Emerald Rapids), so
 * there a head group of few rows of bfloat16 is computed in float32; of up to 16 more, the unit takes the
 * same time whatever the rows. Asked of the CPU and not measured, for the results depend on it. */
static const struct {
    const char *isa, *needs; /* by the names that CPUs are sold under */
    bool (*is_supported)(void);
    const fa_kernel *float32, *float64, *bfloat16, *split;
    int float32_rows; /* head groups of at most so many rows of bfloat16 are computed in float32 */
} table[] = {
#if defined(__x86_64__)
    {"amx", "AMX-BF16", fa_cpu_has_amx, &fa_float32_avx512, &fa_float64_avx512, &fa_bf16tile_amx,
     &fa_split_amx, 4},
    {"avx512bf16", "AVX512-BF16", fa_cpu_has_avx512bf16, &fa_float32_avx512, &fa_float64_avx512,
     &fa_bf16dot_avx512bf16, NULL, 0},
    {"avx512", "AVX-512 (F, BW, DQ, VL)", fa_cpu_has_avx512, &fa_float32_avx512, &fa_float64_avx512, NULL,
     NULL, 0},
    {"avx2", "AVX2, FMA and F16C", fa_cpu_has_avx2, &fa_float32_avx2, &fa_float64_avx2, NULL, NULL, 0},
#elif defined(__aarch64__)
    {"neonbf16", "FEAT_BF16", fa_cpu_has_neonbf16, &fa_float32_neon, &fa_float64_neon, &fa_bf16dot_neonbf16,
     NULL, 0},
    {"neon", "Advanced SIMD", fa_cpu_has_neon, &fa_float32_neon, &fa_float64_neon, NULL, NULL, 0},
#endif
    {"baseline", "nothing", fa_cpu_has_baseline, &fa_float32_baseline, &fa_float64_baseline, NULL, NULL, 0},
#if defined(__x86_64__)
    {"amx-emulated", "AVX512-BF16", fa_cpu_has_avx512bf16, &fa_float32_avx512, &fa_float64_avx512,
     &fa_bf16tile_amx_emulated, &fa_split_amx_emulated, 4},
#endif
};

enum { NUM_ISAS = sizeof table / sizeof *table };

static atomic_int selected = -1;
static atomic_int split_mode = FA_SPLIT_IF_FASTER;

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

bool fa_describe_isa(int index, fa_isa *isa)
{
    if (index > 0 && strcmp(table[index - 1].isa, "baseline") == 0)
        return false;
    *isa = (fa_isa){table[index].isa, table[index].needs, table[index].is_supported()};
    return true;
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
    const int row = selected_row();
    const fa_dtype computed_in = fa_traits(dtype).computed_in;
    if (computed_in == FA_FLOAT64)
        return table[row].float64;
    if (computed_in == FA_BFLOAT16 && table[row].bfloat16)
        return table[row].bfloat16;
    return table[row].float32;
}

const fa_kernel *fa_find_kernel(const char *name)
{
    const int row = selected_row();
    const fa_kernel *kernels[] = {table[row].float32, table[row].float64, table[row].bfloat16,
                                  table[row].split};
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (kernels[i] && strcmp(kernels[i]->name, name) == 0)
            return kernels[i];
    return NULL;
}

void fa_set_split_mode(fa_split_mode mode)
{
    atomic_store(&split_mode, mode);
}

bool fa_splits(void)
{
    return table[selected_row()].split && atomic_load(&split_mode) != FA_SPLIT_NEVER;
}

/* Emerald Rapids: to split float32 pays from 128 rows and keys on (1.1 times the speed of the multiply-adds,
 * 1.6 of many), float16 from 64 on; fewer rows leave a tile empty, and what is split and packed must be
 * met by enough of both. */
static bool pays_to_split(const fa_problem *p, int64_t rows, int64_t keys)
{
    const int64_t least = p->query.dtype == FA_FLOAT16 ? 64 : 128;
    if (atomic_load(&split_mode) == FA_SPLIT_ALWAYS)
        return true;
    return rows >= least && keys >= least && p->head_dim >= 64;
}

/* Whether decode tiles of bfloat16 take int8 keys, each of which is exact in it; their scales meet scores and
 * probabilities. */
static bool decodes_int8(const fa_kernel *kernel, const fa_problem *p, int64_t rows)
{
    return kernel && kernel->decodes_int8 && fa_is_decode(p, rows, kernel->decode_rows) &&
           p->query.dtype == FA_BFLOAT16 && p->key.dtype == FA_INT8 && p->key.col == 1 && p->value.col == 1 &&
           p->head_dim % 32 == 0 && p->head_dim_v % 32 == 0;
}

/* The query's dtype decides: float32 queries keep their precision on bfloat16 keys. But keys that are exact
 * in float32 and not in bfloat16, as int8 times its scales, are computed in float32 whatever the query,
 * unless the scales stay apart. */
const fa_kernel *fa_select_kernel(const fa_problem *p, int64_t rows, int64_t keys)
{
    const int row = selected_row();
    const bool in_float32 = fa_traits(p->key.dtype).computed_in == FA_FLOAT32;
    const bool keeps_scales = decodes_int8(table[row].bfloat16, p, rows);
    const fa_kernel *kernel =
        keeps_scales ? table[row].bfloat16 : fa_kernel_for_dtype(in_float32 ? FA_FLOAT32 : p->query.dtype);
    if (kernel == table[row].bfloat16 && rows <= table[row].float32_rows)
        return table[row].float32;
    if (fa_traits(p->query.dtype).computed_in == FA_FLOAT32 && fa_splits() && pays_to_split(p, rows, keys))
        return table[row].split;
    return kernel;
}

const fa_kernel *fa_select_backward_kernel(const fa_problem *p)
{
    return fa_kernel_for_dtype(p->query.dtype);
}

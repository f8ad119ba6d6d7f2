/* The table of kernels: instruction set × precision. */
#include "dispatch.h"

#include <stdatomic.h>
#include <string.h>

#include "cpu.h"

extern const fa_kernel fa_float32_baseline, fa_float64_baseline;

#if defined(__x86_64__)
extern const fa_kernel fa_float32_avx2, fa_float64_avx2;
extern const fa_kernel fa_float32_avx512, fa_float64_avx512;
extern const fa_kernel fa_bf16dot_avx512bf16, fa_bf16tile_amx, fa_bf16tile_amx_emulated;
#endif

/* Best first. NULL: bfloat16 is computed in float32, as is every other dtype that has no column. Behind the
 * baseline, which every CPU has: what is for tests, chosen by name alone and not listed.
 *
 * CPUs with the tile unit issue dot products at a quarter of the rate of multiply-adds (Sapphire, Emerald and
 * Granite Rapids), so there decode tiles of bfloat16, which are too small for the unit, are computed in
 * float32: four rows take two thirds of the time. Asked of the CPU and not measured, for the results depend
 * on it. */
static const struct {
    const char *isa;
    bool (*is_supported)(void);
    const fa_kernel *float32, *float64, *bfloat16;
    bool decodes_in_float32;
} table[] = {
#if defined(__x86_64__)
    {"amx", fa_cpu_has_amx, &fa_float32_avx512, &fa_float64_avx512, &fa_bf16tile_amx, true},
    {"avx512bf16", fa_cpu_has_avx512bf16, &fa_float32_avx512, &fa_float64_avx512, &fa_bf16dot_avx512bf16,
     false},
    {"avx512", fa_cpu_has_avx512, &fa_float32_avx512, &fa_float64_avx512, NULL, false},
    {"avx2", fa_cpu_has_avx2, &fa_float32_avx2, &fa_float64_avx2, NULL, false},
#endif
    {"baseline", fa_cpu_has_baseline, &fa_float32_baseline, &fa_float64_baseline, NULL, false},
#if defined(__x86_64__)
    {"amx-emulated", fa_cpu_has_avx512bf16, &fa_float32_avx512, &fa_float64_avx512, &fa_bf16tile_amx_emulated,
     true},
#endif
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
    bool listed = true;
    int count = 0;
    for (int row = 0; row < NUM_ISAS && listed; row++) {
        if (table[row].is_supported())
            names[count++] = table[row].isa;
        listed = strcmp(table[row].isa, "baseline") != 0;
    }
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

const fa_kernel *fa_find_kernel(const char *name)
{
    const int row = selected_row();
    const fa_kernel *kernels[] = {table[row].float32, table[row].float64, table[row].bfloat16};
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (kernels[i] && strcmp(kernels[i]->name, name) == 0)
            return kernels[i];
    return NULL;
}

/* The query's dtype decides: float32 queries keep their precision on bfloat16 keys. int8 keys, times their
 * scales, are exact in float32 and not in bfloat16. */
const fa_kernel *fa_select_kernel(const fa_problem *problem, int64_t group_rows)
{
    const int row = selected_row();
    const fa_kernel *kernel =
        fa_kernel_for_dtype(problem->key.dtype == FA_INT8 ? FA_FLOAT32 : problem->query.dtype);
    if (kernel == table[row].bfloat16 && table[row].decodes_in_float32 && group_rows <= kernel->decode_rows)
        return table[row].float32;
    return kernel;
}

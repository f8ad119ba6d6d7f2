/* The product by multiply-adds: an operand is broadcast against the vectors of a packed row.
 *
 * Requires an operand and MICRO_ROWS; provides product.h's contract. */
#include "for_editors.h"

#ifndef FA_KERNEL_PRODUCT_FMA_H
#define FA_KERNEL_PRODUCT_FMA_H

#include "micro_kernel.h"

#define PRODUCT_ROWS(vectors) MICRO_ROWS(vectors)

/* Whether wide tiles are attended by attend_pipeline.h. */
#define IS_PIPELINED 0
#define HAS_BACKWARD 1

/* Of half types, whose packing tiles share, eight tiles take 3 % less time than four (Zen 5). */
#define MAX_TILES 8
#define ITEMS_PER_THREAD 24
#define SPLITS_MANY_ROWS true

/* The CPU needs to be in no state of its own. */
FA_INLINE void begin_products(void) {}

FA_INLINE void end_products(void) {}

FA_INLINE void product_scores(const product_rows *a, int i, const packed_vec *b, int length, int vectors,
                              real scale, const product_prefetch *prefetch, vec *panel,
                              vec block_max[MAX_VECTORS])
{
    const int rows = MICRO_ROWS(vectors);
    vec c[MAX_MICRO_ROWS][MAX_VECTORS] = {0};
    const char *at[MAX_MICRO_ROWS];
    product_row_pointers(a, i, rows, at);
    micro_kernel(at, false, a->step, b, length, vectors, prefetch, c);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int m = 0; m < vectors; m++) {
            vec s = scale == 1 ? c[r][m] : c[r][m] * scale;
            panel[r * vectors + m] = s;
            block_max[m] = vec_max(s, block_max[m]);
        }
}

/* The sum is formed apart and then added: of many keys, rounding errors grow with the blocks and not with the
 * keys. */
FA_INLINE void product_add(const product_rows *a, int i, const packed_vec *b, int length, int vectors,
                           bool nan_safe, bool empty, const product_prefetch *prefetch, vec *panel)
{
    const int rows = MICRO_ROWS(vectors);
    vec c[MAX_MICRO_ROWS][MAX_VECTORS] = {0};
    if (!nan_safe && a->row == sizeof(operand) && i + rows <= a->last) {
        const char *first = a->data + i * (int)sizeof(operand);
        micro_kernel(&first, true, a->step, b, length, vectors, prefetch, c);
    } else {
        const char *at[MAX_MICRO_ROWS];
        product_row_pointers(a, i, rows, at);
        if (nan_safe)
            product_steps(at, false, a->step, b, 0, length, vectors, true, c);
        else
            micro_kernel(at, false, a->step, b, length, vectors, prefetch, c);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int m = 0; m < vectors; m++)
            panel[r * vectors + m] = empty ? c[r][m] : panel[r * vectors + m] + c[r][m];
}

/* The micro-kernel's multiply-adds with nothing else: all chains in registers. */
static double measure_peak_rounds(int64_t rounds)
{
    enum { CHAINS = MICRO_ROWS(MAX_VECTORS) * MAX_VECTORS };
    volatile operand source = 0;
    operand a = source;
    vec c[CHAINS];
    for (int i = 0; i < CHAINS; i++)
        c[i] = vec_splat((real)source);
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 24
        for (int i = 0; i < CHAINS; i++)
            c[i] = multiply_add(a, (packed_vec)c[i], c[i]); /* nothing that could be computed once for all */
    }
    real sum = 0;
    for (int i = 0; i < CHAINS; i++)
        sum += c[i][0];
    volatile real sink = sum;
    (void)sink;
    return (double)rounds * CHAINS * LANES * 2 * TILE_K;
}

#endif

/* The product of the library. A is read in place, B is packed, C is a panel; B and C have `vectors` vectors
 * to a row:
 *
 *     product_scores:  C[i][m] = scale · Σ_k A[i][k] · B[k][m], and each lane's largest
 *     product_add:     C[i][m] += Σ_k A[i][k] · B[k][m], or = where C is empty
 *
 * for PRODUCT_ROWS(vectors) rows from i on, each operand A[i][k] being TILE_K elements along the reduction. C
 * is written to its last whole product. product_fma.h and product_amx.h fulfil it; wide.h calls it.
 *
 * Requires tile sizes and an operand; provides what the two share. */
#include "for_editors.h"

#ifndef FA_KERNEL_PRODUCT_H
#define FA_KERNEL_PRODUCT_H

#include "prefetch.h"

#define MAX_MICRO_ROWS 8

/* Rows that a product may write beyond the last: the tile unit writes two blocks of 16 rows at a time. */
#define MAX_SPARE_ROWS 31

/* Rows of A: operand k of row i lies at data + i * row + k * step. Rows outside [first, last) may not be
 * read: where a product takes them all the same, the nearest stands for them. */
typedef struct {
    const char *data;
    ptrdiff_t row, step;
    int first, last;
} product_rows;

/* Apart, or GCC would compute it for rows that need no such, in registers that the products want. */
static __attribute__((noinline)) const char *nearest_row(const product_rows *a, int i)
{
    const int nearest = i < a->first ? a->first : i < a->last ? i : a->last - 1;
    return a->data + nearest * a->row;
}

FA_INLINE void product_row_pointers(const product_rows *a, int i, int count, const char **rows)
{
    const bool whole = i >= a->first && i + count <= a->last;
    const char *row = a->data + i * a->row;
#pragma GCC unroll 16
    for (int j = 0; j < count; j++, row += a->row)
        rows[j] = whole ? row : nearest_row(a, i + j);
}

#endif

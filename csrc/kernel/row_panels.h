/* Rows as B of a product whose lanes are columns: the gradients of keys and values,
 *
 *     G[n][e] += Σ_m A[n][m] · R[m][e],
 *
 * sum over the query rows m of a tile. R's vectors are dealt out to row panels of at most MAX_VECTORS, each
 * of them [m / TILE_K][vectors]; those of G lie as [panel][n][vectors]. A is a score panel, read in place or
 * rounded to operands.
 *
 * Requires state.h; provides row panels, and the sums over them. */
#include "for_editors.h"

#ifndef FA_KERNEL_ROW_PANELS_H
#define FA_KERNEL_ROW_PANELS_H

#include "state.h"

/* Columns [vector * LANES, ...) of `vectors` vectors. */
typedef struct {
    int vector, vectors;
} column_panel;

/* Even ones: a product of a single vector has few chains. */
FA_INLINE int count_column_panels(int64_t columns)
{
    return (vectors_of(columns) + MAX_VECTORS - 1) / MAX_VECTORS;
}

FA_INLINE column_panel column_panel_at(int64_t columns, int i)
{
    const int all = vectors_of(columns), panels = count_column_panels(columns);
    const int each = all / panels, wider = all % panels;
    return (column_panel){i * each + (i < wider ? i : wider), each + (i < wider)};
}

/* Rows of the panels of a tile of that many vectors. */
FA_INLINE int row_panel_rows(int vectors)
{
    return vectors * LANES / TILE_K;
}

/* Vectors of all row panels of a full tile. */
FA_INLINE int64_t row_panel_vectors(int64_t columns)
{
    return (int64_t)row_panel_rows(MAX_VECTORS) * vectors_of(columns);
}

/* rows[j] for every lane of a tile of `vectors`. */
static void pack_row_panels(char *const *rows, ptrdiff_t col, fa_dtype dtype, int64_t columns, int vectors,
                            packed_vec *to)
{
    for (int i = 0; i < count_column_panels(columns); i++) {
        const column_panel panel = column_panel_at(columns, i);
        for (int m = 0; m < row_panel_rows(vectors); m++)
            for (int v = panel.vector; v < panel.vector + panel.vectors; v++) {
                const int count = (int)min_i64(LANES, columns - v * LANES);
                *to++ = pack_row_operands(rows + m * TILE_K, v * LANES * col, col, dtype, count);
            }
    }
}

/* Rows of a block of sums: its keys, and what a product writes behind them. */
#define SUM_ROWS (KEY_BLOCK + MAX_MICRO_ROWS)

FA_INLINE int64_t sum_vectors(int64_t columns)
{
    return (int64_t)SUM_ROWS * vectors_of(columns);
}

/* A of the product: panel rows [0, rows), and zeros as far as products may read behind them. */
typedef struct {
    const char *data;
    int rows;
    ptrdiff_t row;
} panel_operands;

/* The panel's rows as operands, at `to` unless they are operands as they are. */
static panel_operands as_operands(vec *panel, int rows, int vectors, char *to)
{
    for (int i = rows * vectors; i < (rows + MAX_MICRO_ROWS) * vectors; i++)
        panel[i] = vec_splat(0);
    const char *data = round_panel_rows(panel, rows + MAX_MICRO_ROWS, vectors, to);
    return (panel_operands){data, rows, (ptrdiff_t)vectors * (ptrdiff_t)sizeof(vec) / TILE_K};
}

/* Where an operand is 0, what it meets is hidden, be it NaN. One sum at a time: it is rare, and its bits are
 * those of product_add. */
static void add_rows_nan_safe(const panel_operands *a, const packed_vec *b, int length, int vectors,
                              vec *sums)
{
    for (int n = 0; n < a->rows; n++)
        for (int v = 0; v < vectors; v++) {
            vec sum = {0};
            for (int m = 0; m < length; m++) {
                operand x;
                memcpy(&x, a->data + n * a->row + m * (int)sizeof x, sizeof x);
                sum = multiply_add_visible(x, b[m * vectors + v], sum);
            }
            sums[n * vectors + v] += sum;
        }
}

FA_INLINE void add_rows_fast(const panel_operands *a, const packed_vec *b, int length, int vectors, vec *sums)
{
    const product_prefetch nothing = {.every = INT_MAX};
    const product_rows rows = {a->data, a->row, sizeof(operand), 0, a->rows + MAX_MICRO_ROWS};
    for (int n = 0; n < a->rows; n += PRODUCT_ROWS(vectors))
        product_add(&rows, n, b, length, vectors, false, false, &nothing, sums + n * vectors);
}

/* sums[n][e] += Σ_m a[n][m] · rows[m][e], for the keys of the panel, the first of which is row `first` of the
 * block's sums; `vectors` are the tile's. */
static void add_rows(const panel_operands *a, const packed_vec *rows, int64_t columns, int vectors,
                     bool nan_safe, int first, vec *sums)
{
    const int length = row_panel_rows(vectors);
    for (int i = 0; i < count_column_panels(columns); i++) {
        const int width = column_panel_at(columns, i).vectors;
        vec *at = sums + first * width;
        if (nan_safe)
            add_rows_nan_safe(a, rows, length, width, at);
        else
            WITH_VECTORS(width, add_rows_fast(a, rows, length, VECTORS, at));
        rows += length * width;
        sums += SUM_ROWS * width;
    }
}

#endif

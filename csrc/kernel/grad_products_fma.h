/* The products of the backward pass by multiply-adds, and what they need packed. Those whose lanes are query
 * rows are the forward pass's; those of the gradients of keys and values have columns as lanes,
 *
 *     G[n][e] += Σ_m A[n][m] · R[m][e],
 *
 * sums over the query rows m of a tile. R's vectors are dealt out to column panels of at most MAX_VECTORS,
 * each [m / TILE_K][vectors]; those of G lie as [panel][n][vectors]. A is a score panel, read in place or
 * rounded to operands.
 *
 * Requires state.h; provides the five products. grad_products_amx.h has the same by the tile unit. */
#include "for_editors.h"

#ifndef FA_KERNEL_GRAD_PRODUCTS_FMA_H
#define FA_KERNEL_GRAD_PRODUCTS_FMA_H

#include "state.h"

/* Tiles that share a key block: what a tile has packed is 5 panels, and the blocks of K, V, dK and dV are
 * read from L2 once for each. */
#define MAX_GRAD_TILES 4
#define GRAD_TILE_BYTES (384 << 10)

#define FUSES_SOFTMAX 0

/* Powers of which as much is computed a row ahead as pays. */
typedef exponent backward_power;

FA_INLINE backward_power backward_exponent(vec x)
{
    return split_exponent(x);
}

FA_INLINE vec backward_exp2_of(backward_power x)
{
    return vec_exp2_of(x);
}

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

FA_INLINE size_t row_panel_bytes(int64_t columns, int num_tiles)
{
    return (size_t)(num_tiles * row_panel_vectors(columns)) * sizeof(vec);
}

/* The panels of tile i of those that share a block, from rows[j] for every lane of its `vectors`. */
static void pack_row_panels(char *const *rows, ptrdiff_t col, fa_dtype dtype, int64_t columns, int vectors,
                            int i, packed_vec *panels)
{
    packed_vec *to = panels + i * row_panel_vectors(columns);
    for (int k = 0; k < count_column_panels(columns); k++) {
        const column_panel panel = column_panel_at(columns, k);
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

FA_INLINE size_t panel_operand_bytes(void)
{
    return TILE_K > 1 ? (KEY_BLOCK + MAX_SPARE_ROWS) * MAX_VECTORS * sizeof(vec) : 0;
}

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

/* panel[r][m] = scale Σ_d rows[first + r][d] b[d][m], for all of `range`. */
FA_INLINE void multiply_rows(const operand_block *rows, const key_range *range, const packed_vec *b,
                             int64_t columns, real scale, int vectors, vec *panel)
{
    const product_prefetch nothing = {.every = INT_MAX};
    const product_rows a = key_rows(range, rows);
    const int length = (int)((columns + TILE_K - 1) / TILE_K);
    vec unused[MAX_VECTORS];
    for (int m = 0; m < vectors; m++)
        unused[m] = vec_splat(0);
    for (int r = 0; r < num_keys(range); r += PRODUCT_ROWS(vectors))
        product_scores(&a, r, b, length, vectors, scale, &nothing, panel + r * vectors, unused);
}

/* sums[d][m] += Σ_r keys[first + r][d] panel[r][m], or = where there are none yet. The panel becomes
 * operands. */
FA_INLINE void multiply_columns(const operand_block *keys, const key_range *range, vec *panel,
                                int64_t columns, int vectors, bool nan_safe, bool empty, vec *sums)
{
    const product_prefetch nothing = {.every = INT_MAX};
    const packed_vec *b = pack_probabilities(panel, num_keys(range), vectors);
    const product_rows a = {keys->data + (range->first / TILE_K - keys->first) * keys->row, keys->col,
                            keys->row, 0, (int)columns};
    for (int d = 0; d < columns; d += PRODUCT_ROWS(vectors))
        product_add(&a, d, b, num_keys(range) / TILE_K, vectors, nan_safe, empty, &nothing,
                    sums + d * vectors);
}

/* Where a product reads what is not finite, multiply_add_nan_safe keeps it from rows that do not see it. */
FA_INLINE void clear_not_finite(char *packed, size_t bytes)
{
    (void)packed, (void)bytes;
}

FA_INLINE void add_columns_not_finite(const source_rows *keys, fa_interval block, const key_range *range,
                                      const vec *panel, int64_t columns, vec *sums)
{
    (void)keys, (void)block, (void)range, (void)panel, (void)columns, (void)sums;
}

/* Of a block of keys and the tiles that share it. */
typedef struct {
    int64_t head_dim, head_dim_v;
    const fa_array *query, *grad_out;
    vec *key_sums, *value_sums;
    const packed_vec *query_rows, *grad_out_rows; /* panels of all tiles */
    char *probability_operands, *grad_operands;   /* room */
} key_gradients;

FA_INLINE void begin_key_gradients(key_gradients *k)
{
    (void)k;
}

/* Adds what tile i contributes: `probabilities` and `grad_scores` are its panels, of `range`. */
FA_INLINE void add_key_gradients(key_gradients *k, int i, const tile *t, char *const *grad_out_row,
                                 const key_range *range, vec *probabilities, vec *grad_scores, int vectors,
                                 bool nan_safe)
{
    (void)t, (void)grad_out_row;
    const int rows = num_keys(range), first = (int)(range->first % KEY_BLOCK);
    const panel_operands a = as_operands(probabilities, rows, vectors, k->probability_operands);
    add_rows(&a, k->grad_out_rows + i * row_panel_vectors(k->head_dim_v), k->head_dim_v, vectors, nan_safe,
             first, k->value_sums);
    const panel_operands b = as_operands(grad_scores, rows, vectors, k->grad_operands);
    add_rows(&b, k->query_rows + i * row_panel_vectors(k->head_dim), k->head_dim, vectors, nan_safe, first,
             k->key_sums);
}

FA_INLINE void finish_key_gradients(key_gradients *k)
{
    (void)k;
}

#endif

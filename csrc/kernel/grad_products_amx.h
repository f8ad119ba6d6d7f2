/* The products of the backward pass by the tile unit. Those whose lanes are query rows are panels, as in the
 * forward pass. Those of the gradients of keys and values have columns as lanes, and a tile of 32 query rows
 * is one step of their reduction: sums in memory are loaded and stored once for all tiles that share the
 * block, of which the rounded probabilities and dS are kept until then,
 *
 *     A: [key][tile][32 rows],  B: [32 columns][tile][16 pairs of rows][2 vectors],  G: [32 columns][key][2].
 *
 * Of a tile and a block there are 5 products of 256 cycles (64 columns), and 128 vectors of scores to soften
 * and round: they follow one another, so neither hides the other.
 *
 * Requires state.h and product_amx.h; provides the five products, as grad_products_fma.h does. */
#include "for_editors_amx.h"

#ifndef FA_KERNEL_GRAD_PRODUCTS_AMX_H
#define FA_KERNEL_GRAD_PRODUCTS_AMX_H

#include "state.h"

#define MAX_GRAD_TILES 8
#define GRAD_TILE_BYTES (768 << 10)

#define FUSES_SOFTMAX 1

/* Enough for what is rounded to bfloat16. */
typedef vec backward_power;

FA_INLINE backward_power backward_exponent(vec x)
{
    return x;
}

FA_INLINE vec backward_exp2_of(backward_power x)
{
    return vec_exp2_coarse(x);
}

/* Columns [vector * LANES, ...) of `vectors` vectors; of the last, the second may lie behind all columns. */
typedef struct {
    int vector, vectors;
} column_panel;

FA_INLINE int count_column_panels(int64_t columns)
{
    return (vectors_of(columns) + MAX_VECTORS - 1) / MAX_VECTORS;
}

FA_INLINE column_panel column_panel_at(int64_t columns, int i)
{
    (void)columns;
    return (column_panel){i * MAX_VECTORS, MAX_VECTORS};
}

/* Vectors of a tile in a column panel, and of a column panel. */
#define ROW_PANEL (TILE_ROWS / 2 * MAX_VECTORS)
#define COLUMN_PANEL (MAX_GRAD_TILES * ROW_PANEL)

/* There is room for MAX_GRAD_TILES, be there fewer. */
FA_INLINE size_t row_panel_bytes(int64_t columns, int num_tiles)
{
    (void)num_tiles;
    return (size_t)(count_column_panels(columns) * COLUMN_PANEL) * sizeof(vec);
}

#define SUM_ROWS KEY_BLOCK

FA_INLINE int64_t sum_vectors(int64_t columns)
{
    return (int64_t)SUM_ROWS * MAX_VECTORS * count_column_panels(columns);
}

/* The panels of tile i of those that share a block, from rows[j] for every lane. What is not finite is 0
 * there, and is added by itself. */
static void pack_row_panels(char *const *rows, ptrdiff_t col, fa_dtype dtype, int64_t columns, int vectors,
                            int i, packed_vec *panels)
{
    (void)dtype, (void)vectors;
    for (int k = 0; k < count_column_panels(columns); k++) {
        packed_vec *to = panels + k * COLUMN_PANEL + i * ROW_PANEL;
        for (int m = 0; m < TILE_ROWS; m += 2)
            for (int v = 0; v < MAX_VECTORS; v++) {
                const int e = (k * MAX_VECTORS + v) * LANES, count = (int)min_i64(LANES, columns - e);
                const halves pairs = (halves)make_pairs(load_halves(rows[m] + e * col, col, count),
                                                        load_halves(rows[m + 1] + e * col, col, count));
                *to++ = (packed_vec)(pairs & (halves)((pairs & 0x7f80) != 0x7f80));
            }
    }
}

/* panel[r][m] = scale Σ_d rows[first + r][d] b[d][m], for all of `range`. */
FA_INLINE void multiply_rows(const operand_block *rows, const key_range *range, const packed_vec *b,
                             int64_t columns, real scale, int vectors, vec *panel)
{
    const panel_product product = {.a = rows->data + (range->first - rows->first) * rows->row,
                                   .a_row = rows->row,
                                   .a_step = rows->col,
                                   .b = b,
                                   .c = panel,
                                   .blocks = num_keys(range) / TMM_ROWS,
                                   .steps = (int)((columns + TILE_K - 1) / TILE_K),
                                   .empty = true,
                                   .parts = &one_part};
    multiply_panel_alone(&product);
    for (int i = 0; i < num_keys(range) * vectors && scale != 1; i++)
        panel[i] *= scale;
}

/* What is not finite becomes 0, in columns that were packed. */
static void clear_not_finite(char *packed, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += FA_VECTOR_BYTES) {
        const halves x = (halves)vec_load(packed + i);
        vec_store(packed + i, (vec)(x & (halves)((x & 0x7f80) != 0x7f80)));
    }
}

/* Adds the products of what was cleared, keys from the range's first on, to the rows that see them. */
static void add_columns_not_finite(const source_rows *keys, fa_interval block, const key_range *range,
                                   const vec *panel, int64_t columns, vec *sums)
{
    const fa_array *array = keys->array;
    for (int64_t n = range->key_lo; n < range->key_hi; n++)
        for (int64_t d = 0; d < columns; d++) {
            const char *at = keys->data + (n - block.lo) * array->row + d * array->col;
            const float x = load_element(at, array->dtype);
            for (int m = 0; m < MAX_VECTORS && !isfinite(x); m++) {
                const vec y = panel[(n - range->first) * MAX_VECTORS + m];
                sums[d * MAX_VECTORS + m] += vec_select(vec_equal(y, vec_splat(0)), vec_splat(0), y * x);
            }
        }
}

/* sums[d][m] += Σ_r keys[first + r][d] pairs[r][m], or = where there are none yet. */
FA_INLINE void multiply_column_pairs(const operand_block *keys, const key_range *range,
                                     const packed_vec *pairs, int64_t columns, bool empty, vec *sums)
{
    const panel_product product = {.a = keys->data + (range->first / TILE_K - keys->first) * keys->row,
                                   .a_row = keys->col,
                                   .a_step = keys->row,
                                   .b = pairs,
                                   .c = sums,
                                   .blocks = (int)((columns + TMM_ROWS - 1) / TMM_ROWS),
                                   .steps = num_keys(range) / TILE_K,
                                   .empty = empty,
                                   .parts = &one_part};
    multiply_panel_alone(&product);
}

/* The same of a panel, which is rounded. */
FA_INLINE void multiply_columns(const operand_block *keys, const key_range *range, vec *panel,
                                int64_t columns, int vectors, bool nan_safe, bool empty, vec *sums)
{
    (void)vectors, (void)nan_safe;
    packed_vec pairs[KEY_BLOCK / 2 * MAX_VECTORS];
    for (int n = 0; n < num_keys(range); n += 2)
        for (int m = 0; m < MAX_VECTORS; m++)
            pairs[n / 2 * MAX_VECTORS + m] =
                round_pairs(panel[n * MAX_VECTORS + m], panel[(n + 1) * MAX_VECTORS + m]);
    multiply_column_pairs(keys, range, pairs, columns, empty, sums);
}

/* Of a block of keys and the tiles that share it. */
typedef struct {
    int64_t head_dim, head_dim_v;
    const fa_array *query, *grad_out;
    vec *key_sums, *value_sums;
    const packed_vec *query_rows, *grad_out_rows; /* panels of all tiles */
    char *probability_operands, *grad_operands;   /* A */
    int first_tile, num_tiles;                    /* whose operands are there */
} key_gradients;

#define OPERAND_ROW (MAX_GRAD_TILES * FA_VECTOR_BYTES)

FA_INLINE size_t panel_operand_bytes(void)
{
    return KEY_BLOCK * OPERAND_ROW;
}

FA_INLINE void begin_key_gradients(key_gradients *k)
{
    k->num_tiles = 0;
}

/* Rows of a panel, rounded, as column i of A; 0 for keys outside of the range. */
FA_INLINE void round_rows(const vec *panel, int first, int rows, int i, char *to)
{
    to += i * FA_VECTOR_BYTES;
    for (int n = 0; n < KEY_BLOCK; n++) {
        const vec *row = panel + (n - first) * MAX_VECTORS;
        const bool is_there = n >= first && n < first + rows;
        vec_store(to + n * OPERAND_ROW, is_there ? round_in_order(row[0], row[1]) : vec_splat(0));
    }
}

/* Tiles between two that see the block, and do not. */
FA_INLINE void clear_tiles(key_gradients *k, int begin, int end)
{
    for (int i = begin; i < end; i++) {
        round_rows(NULL, 0, 0, i, k->probability_operands);
        round_rows(NULL, 0, 0, i, k->grad_operands);
    }
}

/* From now on, operands up to those of tile i are there. */
FA_INLINE void include_tile(key_gradients *k, int i)
{
    if (k->num_tiles == 0)
        k->first_tile = i;
    else
        clear_tiles(k, k->first_tile + k->num_tiles, i);
    k->num_tiles = i + 1 - k->first_tile;
}

/* Adds the products of rows[m], where they are not finite and thus 0 in B, to the keys that they see. */
static void add_rows_not_finite(char *const *rows, const fa_array *array, int64_t columns, const vec *panel,
                                int first, int num_keys, vec *sums)
{
    for (int m = 0; m < TILE_ROWS; m++)
        for (int e = 0; e < columns; e++) {
            const float x = load_element(rows[m] + e * array->col, array->dtype);
            const int column = e / TILE_ROWS * SUM_ROWS * MAX_VECTORS + e % TILE_ROWS / LANES;
            for (int n = 0; n < num_keys && !isfinite(x); n++) {
                const float a = panel[n * MAX_VECTORS + m / LANES][m % LANES];
                if (a != 0)
                    sums[column + (first + n) * MAX_VECTORS][e % LANES] += a * x;
            }
        }
}

/* Adds what tile i contributes: `probabilities` and `grad_scores` are its panels, of `range`. */
FA_INLINE void add_key_gradients(key_gradients *k, int i, const tile *t, char *const *grad_out_row,
                                 const key_range *range, vec *probabilities, vec *grad_scores, int vectors,
                                 bool nan_safe)
{
    (void)vectors;
    const int first = (int)(range->first % KEY_BLOCK), rows = num_keys(range);
    include_tile(k, i);
    round_rows(probabilities, first, rows, i, k->probability_operands);
    round_rows(grad_scores, first, rows, i, k->grad_operands);
    if (nan_safe) {
        add_rows_not_finite(grad_out_row, k->grad_out, k->head_dim_v, probabilities, first, rows,
                            k->value_sums);
        add_rows_not_finite(t->query_row, k->query, k->head_dim, grad_scores, first, rows, k->key_sums);
    }
}

/* Of a tile's rows: what makes probabilities of scores, and dS of dP. */
typedef struct {
    const vec *lse, *lse_rest, *delta;
    real to_log2;
} softmax_terms;

/* Row r of both panels, vector m: its probability, and dS in *grad_score. */
FA_INLINE vec soften_and_differentiate(const softmax_terms *x, const vec *scores, const vec *grad_scores,
                                       int r, int m, vec *grad_score)
{
    const int at = r * MAX_VECTORS + m;
    const vec p = vec_exp2_coarse((scores[at] - x->lse[m]) * x->to_log2 + x->lse_rest[m]);
    *grad_score = vec_select(vec_equal(p, vec_splat(0)), vec_splat(0), p * (grad_scores[at] - x->delta[m]));
    return p;
}

/* add_key_gradients and multiply_columns of the probabilities of `scores` and their dS, which are rounded as
 * they are made; `grad_scores` is dP. */
FA_INLINE void add_fused_gradients(key_gradients *k, int i, const key_range *range,
                                   const softmax_terms *terms, const operand_block *key_columns,
                                   const vec *scores, const vec *grad_scores, bool empty, vec *query_sums)
{
    const int first = (int)(range->first % KEY_BLOCK), rows = num_keys(range);
    packed_vec pairs[KEY_BLOCK / 2 * MAX_VECTORS];
    const softmax_terms x = *terms;
    include_tile(k, i);
    if (rows < KEY_BLOCK)
        clear_tiles(k, i, i + 1);
    char *probability = k->probability_operands + i * FA_VECTOR_BYTES + first * OPERAND_ROW;
    char *grad = k->grad_operands + i * FA_VECTOR_BYTES + first * OPERAND_ROW;
    for (int n = 0; n < rows; n += 2) {
        vec p[2][MAX_VECTORS], ds[2][MAX_VECTORS];
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++)
#pragma GCC unroll 2
            for (int m = 0; m < MAX_VECTORS; m++)
                p[r][m] = soften_and_differentiate(&x, scores, grad_scores, n + r, m, &ds[r][m]);
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++, probability += OPERAND_ROW, grad += OPERAND_ROW) {
            vec_store(probability, round_in_order(p[r][0], p[r][1]));
            vec_store(grad, round_in_order(ds[r][0], ds[r][1]));
        }
#pragma GCC unroll 2
        for (int m = 0; m < MAX_VECTORS; m++)
            pairs[n / 2 * MAX_VECTORS + m] = round_pairs(ds[0][m], ds[1][m]);
    }
    multiply_column_pairs(key_columns, range, pairs, k->head_dim, empty, query_sums);
}

static void multiply_operands(const key_gradients *k, const char *operands, const packed_vec *rows,
                              int64_t columns, vec *sums)
{
    for (int i = 0; i < count_column_panels(columns); i++) {
        const panel_product product = {.a = operands + k->first_tile * FA_VECTOR_BYTES,
                                       .a_row = OPERAND_ROW,
                                       .a_step = FA_VECTOR_BYTES,
                                       .b = rows + i * COLUMN_PANEL + k->first_tile * ROW_PANEL,
                                       .c = sums + i * SUM_ROWS * MAX_VECTORS,
                                       .blocks = KEY_BLOCK / TMM_ROWS,
                                       .steps = k->num_tiles,
                                       .parts = &one_part};
        multiply_panel_alone(&product);
    }
}

FA_INLINE void finish_key_gradients(key_gradients *k)
{
    if (k->num_tiles == 0)
        return;
    multiply_operands(k, k->probability_operands, k->grad_out_rows, k->head_dim_v, k->value_sums);
    multiply_operands(k, k->grad_operands, k->query_rows, k->head_dim, k->key_sums);
}

#endif

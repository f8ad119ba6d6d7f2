/* Products of a decode tile of up to 16 rows in the tile unit, whose time does not depend on the rows.
 * Neither keys nor values are transposed:
 *
 *     scores  Sᵀ = K Qᵀ:  16 keys by 32 dims of K in place; Qᵀ packed once
 *     out     O = P V:    P, in pairs of keys n and n + 16, by 16 such pairs of 16 columns of V. Two rows of
 *                         values are interleaved by one shuffle a vector, within its quarters; so the columns
 *                         of `out` come in another order, until order_decode_out
 *
 * Registers have as many rows, or columns, as the tile has rows, so scores are stored as the panel has them.
 * The unit takes 52 cycles for a product of which it begins one every 16: sums come in fours.
 *
 * Requires tile.h and tile_unit.h; provides the products of decode.h. */
#include "for_editors_amx.h"

#ifndef FA_KERNEL_DECODE_TILES_H
#define FA_KERNEL_DECODE_TILES_H

#include "tile.h"
#include "tile_unit.h"

#define TMM_BYTES (TMM_ROWS * FA_VECTOR_BYTES)

/* --- queries and probabilities ------------------------------------------------------------------- */

/* `rows` vectors of 16 pairs -> [pair][row], and back. */
FA_INLINE void interleave_pairs(vec x[DECODE_ROWS], int rows)
{
#pragma GCC unroll 4
    for (int n = rows; n > 1; n /= 2) {
        vec y[DECODE_ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < rows / 2; i++) {
            y[2 * i] = SHUFFLE(x[i], x[i + rows / 2], INTERLEAVE_LOW);
            y[2 * i + 1] = SHUFFLE(x[i], x[i + rows / 2], INTERLEAVE_HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
            x[i] = y[i];
    }
}

FA_INLINE void deinterleave_pairs(vec x[DECODE_ROWS], int rows)
{
#pragma GCC unroll 4
    for (int n = rows; n > 1; n /= 2) {
        vec y[DECODE_ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < rows / 2; i++) {
            y[i] = SHUFFLE(x[2 * i], x[2 * i + 1], EVEN);
            y[i + rows / 2] = SHUFFLE(x[2 * i], x[2 * i + 1], ODD);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
            x[i] = y[i];
    }
}

FA_INLINE void pack_query_pairs(char *const *rows, int count, const fa_problem *p, real sign,
                                packed_vec *query)
{
    for (int d = 0; d < p->head_dim; d += TILE_K, query += count) {
        vec x[DECODE_ROWS];
#pragma GCC unroll 1
        for (int r = 0; r < count; r++)
            x[r] = (vec)times_sign(load_pairs(rows[r] + d * p->query.col, p->query.col, (int)p->head_dim - d),
                                   sign);
        interleave_pairs(x, count);
#pragma GCC unroll 16
        for (int r = 0; r < count; r++)
            query[r] = (packed_vec)x[r];
    }
}

/* The tile's queries, from the pointers to its rows, times `sign`: [head_dim / 2][rows_pow2] pairs, in whole
 * steps of TILE_K. */
static void pack_decode_queries(char *const *rows, int rows_pow2, const fa_problem *p, real sign,
                                packed_vec *query)
{
    WITH_DECODE_ROWS(rows_pow2, pack_query_pairs(rows, ROWS, p, sign, query));
}

/* The panel's probabilities -> [TILE_K keys][row][pair of keys n and n + 16], in place. */
FA_INLINE void pack_probability_pairs(vec *panel, int keys, int rows)
{
    vec *packed = panel;
    for (int n = 0; n < keys; n += TILE_K, panel += 2 * rows, packed += rows) {
        vec x[DECODE_ROWS];
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
            x[i] = (vec)round_pairs(panel[i], panel[rows + i]);
        if (rows == LANES)
            vec_transpose(x);
        else
            deinterleave_pairs(x, rows);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
            packed[i] = x[i];
    }
}

/* --- what is read --------------------------------------------------------------------------------- */

/* Prefetches `lines` lines, `offset` bytes from the beginning, of the rows that are due beside rows
 * [n, n + count): into L2, which is what CPUs with the unit like. */
FA_INLINE void prefetch_due_rows(const prefetch_plan *plan, int n, int count, ptrdiff_t offset, int lines)
{
    for (const int end = n + count; n < end;) {
        const product_prefetch run = prefetch_step(plan, n);
        const int rows = (int)min_i64(run.rows, end - n);
        const char *data = run.data + offset;
        for (int i = 0; i < rows; i++, data += run.row)
#pragma GCC unroll 4
            for (int line = 0; line < lines; line++)
                prefetch_line(data + 64 * line, LINES_TO_L2);
        n += rows;
    }
}

/* 32 elements as bfloat16, which holds each int8. */
FA_INLINE vec load_halves_of(const char *src, fa_dtype dtype)
{
    if (dtype == FA_INT8)
        return round_in_order(vec_load_int8(src), vec_load_int8(src + LANES));
    return vec_load(src);
}

FA_INLINE bool decode_takes(fa_dtype dtype)
{
    return dtype == FA_BFLOAT16 || dtype == FA_INT8;
}

/* --- scores --------------------------------------------------------------------------------------- */

/* Sums 0 to 3, keys 4 to 6, queries 7. */
FA_INLINE void configure_scores(int rows)
{
    const uint8_t bytes = (uint8_t)(4 * rows);
    const tmm_shapes shapes = {{16, 16, 16, 16, 16, 16, 16, 16},
                               {bytes, bytes, bytes, bytes, 64, 64, 64, bytes}};
    tmm_configure(&shapes);
}

/* 16 keys as the unit reads them, `step` bytes from 32 dims to the next: in place, or of 32 dims a copy,
 * where they are int8 or some of them may not be read. */
typedef struct {
    const char *data;
    ptrdiff_t row, step;
} key_tile;

#define KEY_TILES 4

/* 32 dims of the keys from n on, from `offset` on; zeros where a key may not be read. */
FA_INLINE void copy_keys(const product_rows *keys, int n, ptrdiff_t offset, fa_dtype dtype, char *to)
{
    const char *row = keys->data + n * keys->row + offset;
    for (int i = n; i < n + TMM_ROWS; i++, row += keys->row, to += FA_VECTOR_BYTES)
        vec_store(to, i >= keys->first && i < keys->last ? load_halves_of(row, dtype) : vec_splat(0));
}

/* Scores of the keys from n on, 2 or 4 times 16. */
FA_INLINE void multiply_key_tiles(const product_rows *keys, int n, int tiles, const packed_vec *query,
                                  fa_dtype dtype, int steps, int rows, const prefetch_plan *plan,
                                  float *scores)
{
    const int step = TILE_K * element_size(dtype);
    const int due = steps > 0 ? (tiles * TMM_ROWS + steps - 1) / steps : 0; /* prefetched beside a step */
    const int lines = (steps * step + 63) / 64;
    const ptrdiff_t score_row = rows * (ptrdiff_t)sizeof(float);
    char copy[KEY_TILES][TMM_BYTES] __attribute__((aligned(64)));
    key_tile tile[KEY_TILES];
    bool any_copy = false;
    for (int i = 0; i < tiles; i++) {
        const int first = n + i * TMM_ROWS;
        const bool whole = dtype == FA_BFLOAT16 && first >= keys->first && first + TMM_ROWS <= keys->last;
        tile[i] = whole ? (key_tile){keys->data + first * keys->row, keys->row, FA_VECTOR_BYTES}
                        : (key_tile){copy[i], FA_VECTOR_BYTES, 0};
        any_copy |= !whole;
    }
    tmm_zero(0);
    tmm_zero(1);
    tmm_zero(2);
    tmm_zero(3);
    for (int k = 0; k < steps; k++, query += rows) {
        for (int i = 0; i < tiles && any_copy; i++)
            if (tile[i].step == 0)
                copy_keys(keys, n + i * TMM_ROWS, k * step, dtype, copy[i]);
        prefetch_due_rows(plan, n + k * due, due, 0, lines);
        tmm_load(7, query, score_row);
        tmm_load(4, tile[0].data + k * tile[0].step, tile[0].row);
        tmm_dot(0, 4, 7);
        tmm_load(5, tile[1].data + k * tile[1].step, tile[1].row);
        tmm_dot(1, 5, 7);
        if (tiles > 2) {
            tmm_load(6, tile[2].data + k * tile[2].step, tile[2].row);
            tmm_dot(2, 6, 7);
            tmm_load(4, tile[3].data + k * tile[3].step, tile[3].row);
            tmm_dot(3, 4, 7);
        }
    }
    tmm_store(0, scores, score_row);
    tmm_store(1, scores + TMM_ROWS * rows, score_row);
    if (tiles > 2) {
        tmm_store(2, scores + 2 * TMM_ROWS * rows, score_row);
        tmm_store(3, scores + 3 * TMM_ROWS * rows, score_row);
    }
}

FA_INLINE void multiply_keys(const fa_problem *p, const tile *t, const product_rows *keys, int count,
                             fa_dtype dtype, const prefetch_plan *plan, float *scores)
{
    const int rows = t->rows_pow2, steps = (int)key_steps(p->head_dim);
    int n = 0;
    for (; n + KEY_TILES * TMM_ROWS <= count; n += KEY_TILES * TMM_ROWS)
        multiply_key_tiles(keys, n, KEY_TILES, t->query, dtype, steps, rows, plan, scores + n * rows);
    if (n < count)
        multiply_key_tiles(keys, n, KEY_TILES / 2, t->query, dtype, steps, rows, plan, scores + n * rows);
}

static void multiply_decode_keys(const fa_problem *p, const tile *t, const key_range *range,
                                 const operand_block *key, const next_streams *next, real scale, vec *scores)
{
    const product_rows keys = key_rows(range, key);
    prefetch_plan plan;
    stream_ahead(&plan, next->streams, !is_vector_aligned(&p->key, p->head_dim),
                 key->data + (range->key_lo - key->first) * key->row);
    prefetch_rows(&next->query, 0, next->query.count, false);
    prefetch_rows(&next->key_scale, 0, next->key_scale.count, false);
    prefetch_rows(&next->value_scale, 0, next->value_scale.count, false);
    configure_scores(t->rows_pow2);
    WITH_DTYPE(key->dtype, decode_takes,
               multiply_keys(p, t, &keys, num_keys(range), DTYPE, &plan, (float *)scores));
    for (int i = 0; i < panel_rows(t, range, true) && scale != 1; i++)
        scores[i] *= scale;
}

/* --- out ------------------------------------------------------------------------------------------ */

/* Sums 0 to 3, probabilities 4, values 6 and 7. */
FA_INLINE void configure_values(int rows)
{
    const uint8_t r = (uint8_t)rows;
    const tmm_shapes shapes = {{r, r, r, r, r, 16, 16, 16}, {64, 64, 64, 64, 64, 64, 64, 64}};
    tmm_configure(&shapes);
}

/* How the values of TILE_K keys are packed. */
typedef enum {
    PACK_WHOLE,
    PACK_CUT,   /* values that may not be read are 0 */
    PACK_FINITE /* and those that are not finite, too */
} value_packing;

#define VALUE_TILES 4 /* of 16 columns */

/* 32 columns of the values of key n. */
FA_INLINE vec load_value(const product_rows *values, int n, ptrdiff_t offset, fa_dtype dtype,
                         value_packing packing)
{
    if (packing != PACK_WHOLE && (n < values->first || n >= values->last))
        return vec_splat(0);
    const vec x = load_halves_of(values->data + n * values->row + offset, dtype);
    if (packing != PACK_FINITE)
        return x;
    const halves wrong = (halves)(((halves)x & 0x7f80) == 0x7f80);
    return (vec)((halves)x & ~wrong);
}

/* Keys n to n + 31, as tiles of 16 columns: two at a time, or a last one by itself, whose columns keep their
 * order. */
FA_INLINE void pack_value_tiles(const product_rows *values, int n, ptrdiff_t offset, int tiles,
                                fa_dtype dtype, value_packing packing, char *packed)
{
    const int two_tiles = 2 * LANES * element_size(dtype);
#pragma GCC unroll 2
    for (int i = 0; i < TMM_ROWS; i++, packed += FA_VECTOR_BYTES) {
#pragma GCC unroll 2
        for (int k = 0; k < tiles; k += 2) {
            const vec a = load_value(values, n + i, offset + k / 2 * two_tiles, dtype, packing);
            const vec b = load_value(values, n + TMM_ROWS + i, offset + k / 2 * two_tiles, dtype, packing);
            if (tiles == 1) {
                vec_store(packed, (vec)make_pairs(uvec_load_halves(&a), uvec_load_halves(&b)));
                continue;
            }
            vec_store(packed + k * TMM_BYTES, interleave_quarters_low(a, b));
            vec_store(packed + (k + 1) * TMM_BYTES, interleave_quarters_high(a, b));
        }
    }
}

static __attribute__((noinline)) void pack_value_tiles_any(const product_rows *values, int n,
                                                           ptrdiff_t offset, int tiles, fa_dtype dtype,
                                                           value_packing packing, char *packed)
{
    pack_value_tiles(values, n, offset, tiles, dtype, packing, packed);
}

FA_INLINE void multiply_value_tiles(const vec *probabilities, const char *packed, int tiles)
{
    tmm_load(4, probabilities, FA_VECTOR_BYTES);
    tmm_load(6, packed, FA_VECTOR_BYTES);
    tmm_dot(0, 4, 6);
    if (tiles > 1) {
        tmm_load(7, packed + TMM_BYTES, FA_VECTOR_BYTES);
        tmm_dot(1, 4, 7);
    }
    if (tiles > 2) {
        tmm_load(6, packed + 2 * TMM_BYTES, FA_VECTOR_BYTES);
        tmm_dot(2, 4, 6);
        tmm_load(7, packed + 3 * TMM_BYTES, FA_VECTOR_BYTES);
        tmm_dot(3, 4, 7);
    }
}

FA_INLINE void load_sums(const vec *out, ptrdiff_t row, int tiles, bool empty)
{
    if (empty) { /* as registers are that were just configured */
        tmm_zero(0);
        tmm_zero(1);
        tmm_zero(2);
        tmm_zero(3);
        return;
    }
    tmm_load(0, out, row);
    if (tiles > 1)
        tmm_load(1, out + 1, row);
    if (tiles > 2) {
        tmm_load(2, out + 2, row);
        tmm_load(3, out + 3, row);
    }
}

FA_INLINE void store_sums(vec *out, ptrdiff_t row, int tiles)
{
    tmm_store(0, out, row);
    if (tiles > 1)
        tmm_store(1, out + 1, row);
    if (tiles > 2) {
        tmm_store(2, out + 2, row);
        tmm_store(3, out + 3, row);
    }
}

/* out[r][i] (+)= Σ_n p[n][r] value[n][i] over the vectors i of a row. */
typedef struct {
    product_rows values;
    const vec *probabilities; /* of TILE_K keys: [row][pair] */
    int num_keys, rows;
    int vectors;
    bool empty, nan_safe;
    vec *out;
    prefetch_plan prefetch;
} tile_value_product;

/* Columns of `tiles` tiles from vector `first` on. The values of the next keys are packed while those of the
 * present ones are multiplied. */
FA_INLINE void add_value_tiles(const tile_value_product *a, int first, int tiles, fa_dtype dtype)
{
    const ptrdiff_t out_row = a->vectors * (ptrdiff_t)sizeof(vec);
    const ptrdiff_t offset = first * LANES * element_size(dtype);
    const int lines = (tiles * LANES * element_size(dtype) + 63) / 64;
    char packed[2][VALUE_TILES * TMM_BYTES] __attribute__((aligned(64)));
    load_sums(a->out + first, out_row, tiles, a->empty);
    for (int n = 0, i = 0; n < a->num_keys; n += TILE_K, i ^= 1) {
        const bool whole = n >= a->values.first && n + TILE_K <= a->values.last;
        prefetch_due_rows(&a->prefetch, n, TILE_K, offset, lines);
        if (a->nan_safe)
            pack_value_tiles_any(&a->values, n, offset, tiles, dtype, PACK_FINITE, packed[i]);
        else if (!whole)
            pack_value_tiles_any(&a->values, n, offset, tiles, dtype, PACK_CUT, packed[i]);
        else
            pack_value_tiles(&a->values, n, offset, tiles, dtype, PACK_WHOLE, packed[i]);
        if (n > 0)
            multiply_value_tiles(a->probabilities + (n / TILE_K - 1) * a->rows, packed[i ^ 1], tiles);
        if (n + TILE_K == a->num_keys)
            multiply_value_tiles(a->probabilities + n / TILE_K * a->rows, packed[i], tiles);
    }
    store_sums(a->out + first, out_row, tiles);
}

FA_INLINE void add_all_value_tiles(const tile_value_product *a, fa_dtype dtype)
{
    int i = 0;
    for (; i + VALUE_TILES <= a->vectors; i += VALUE_TILES)
        add_value_tiles(a, i, VALUE_TILES, dtype);
    for (; i + 2 <= a->vectors; i += 2)
        add_value_tiles(a, i, 2, dtype);
    if (i < a->vectors)
        add_value_tiles(a, i, 1, dtype);
}

/* The vector of `out` that holds column e, of its row; and the lane. */
FA_INLINE int out_index(int e, int vectors)
{
    if (e / 32 * 2 + 1 >= vectors)
        return e;
    return e / 32 * 32 + e / 4 % 2 * LANES + e % 32 / 8 * 4 + e % 4;
}

/* Adds to the rows that see them, and to no others, the products with values that are not finite. */
static void add_decode_not_finite(const tile_value_product *a, int64_t head_dim_v)
{
    for (int n = a->values.first; n < a->values.last; n++) {
        const char *value = a->values.data + n * a->values.row;
        for (int e = 0; e < head_dim_v; e++) {
            const real v = load_element(value + 2 * e, FA_BFLOAT16);
            if (isfinite(v))
                continue;
            for (int r = 0; r < a->rows; r++) {
                const uint16_t *pairs = (const uint16_t *)(a->probabilities + n / TILE_K * a->rows + r);
                const uint16_t bits = pairs[n % TMM_ROWS * 2 + n / TMM_ROWS % 2];
                if (bits != 0x8000)
                    ((real *)(a->out + r * a->vectors))[out_index(e, a->vectors)] +=
                        float_from_bfloat16(bits) * v;
            }
        }
    }
}

static void add_decode_values(const fa_problem *p, const tile *t, const key_range *range,
                              const operand_block *value, vec *probabilities, const row_stream *streams,
                              bool nan_safe)
{
    WITH_DECODE_ROWS(t->rows_pow2, pack_probability_pairs(probabilities, num_keys(range), ROWS));
    tile_value_product product = {
        .values = key_rows(range, value),
        .probabilities = probabilities,
        .num_keys = num_keys(range),
        .rows = t->rows_pow2,
        .vectors = vectors_of(p->head_dim_v),
        .empty = t->empty,
        .nan_safe = nan_safe,
        .out = t->out,
    };
    stream_ahead(&product.prefetch, streams, !is_vector_aligned(&p->value, p->head_dim_v),
                 value->data + (range->key_lo - value->first) * value->row);
    configure_values(t->rows_pow2);
    WITH_DTYPE(value->dtype, decode_takes, add_all_value_tiles(&product, DTYPE));
    if (nan_safe && value->dtype == FA_BFLOAT16)
        add_decode_not_finite(&product, p->head_dim_v);
}

/* The tile's output in the order of elements. */
static void order_decode_out(const fa_problem *p, const tile *t)
{
    const int vectors = vectors_of(p->head_dim_v);
    for (int r = 0; r < t->rows; r++)
        for (int i = 0; i + 2 <= vectors; i += 2) {
            vec *x = t->out + r * vectors + i, low = x[0], high = x[1];
            x[0] = SHUFFLE(low, high, INTERLEAVE_FOURS_LOW);
            x[1] = SHUFFLE(low, high, INTERLEAVE_FOURS_HIGH);
        }
}

#endif

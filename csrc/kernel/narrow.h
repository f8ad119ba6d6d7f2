/* Products of a narrow tile. A few query rows leave next to no arithmetic: what counts is to read K and V
 * once, at the speed of memory, in vectors as they lie. So here lanes run along the head dims, and a score is
 * a sum over lanes. A row of the score panel holds LANES / narrow keys, key by key, `narrow` rows each. */
#ifndef FA_KERNEL_NARROW_H
#define FA_KERNEL_NARROW_H

#include "lookahead.h"

/* Rows that are needed soon: `count` of them, `row` bytes apart. Requests are spread as finely as the
 * arithmetic allows: the memory serves few at a time, and what waits for a place stops the arithmetic. */
typedef struct {
    const char *data;
    ptrdiff_t row, span;
    int count;
} request;

/* The share of step i of `steps`: some rows, or of all rows a line. */
FA_INLINE void ask_for_share(const request *next, int i, int steps)
{
    if (next->count > steps) {
        const int each = (next->count + steps - 1) / steps;
        for (int j = i * each; j < (i + 1) * each && j < next->count; j++)
            prefetch(next->data + j * next->row, next->span);
    } else if (i * 64 < next->span) {
        for (int j = 0; j < next->count; j++)
            __builtin_prefetch(next->data + j * next->row + i * 64, 0, 2);
    }
}

/* Lane j * rows + r: Σ_d key[j][d] query[r][d]. Registers: LANES sums, a key, and at 512 bits `rows` queries.
 */
FA_INLINE vec dot_keys(const char *const *key, fa_dtype dtype, const panel *query, int vectors, int rows,
                       const request *next)
{
    vec sums[LANES];
    const int at_once = keys_at_once(dtype);
    const int step = key_vector_bytes(dtype);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        sums[i] = vec_splat(0);
    for (int d = 0; d < vectors; d += at_once) {
        ask_for_share(next, d / at_once, vectors / at_once);
#pragma GCC unroll 16
        for (int j = 0; j < LANES / rows; j++) {
#pragma GCC unroll 2
            for (int i = 0; i < at_once; i++) {
                panel k = load_key_vector(key[j] + d * step, dtype, i);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++)
                    sums[j * rows + r] = multiply_lanes(k, query[r * vectors + d + i], sums[j * rows + r]);
            }
        }
    }
    return vec_sums(sums);
}

/* Vectors of a row of values that are summed in registers at once, for all rows: LANES sums at most. */
#define VALUE_VECTORS(rows) (LANES / (rows) < 4 ? LANES / (rows) : 4)

/* out[r][i] (+)= Σ_n p[n][r] value[n][i] over the vectors i of a row. */
typedef struct {
    const char *value;
    ptrdiff_t row;
    const real *p;
    int num_keys;
    int vectors;
    bool fresh; /* out is not there yet */
    vec *out;
    request next; /* a row with each key; its span here is that of a vector */
} value_product;

/* `width` vectors from `first` on. visible_only: where p is -0 the key is hidden from the row, and its value,
 * be it NaN, adds nothing. */
FA_INLINE void add_values(const value_product *a, int first, fa_dtype dtype, int rows, int width,
                          bool visible_only)
{
    vec sums[8][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++)
            sums[r][i] = vec_splat(0);
    const char *value = a->value + first * LANES * element_size(dtype);
    const real *p = a->p;
    for (int n = 0; n < a->num_keys; n++, value += a->row, p += rows) {
        vec v[4];
#pragma GCC unroll 4
        for (int i = 0; i < width; i++)
            v[i] = load_nth(value, dtype, i);
        if (n < a->next.count)
            prefetch(a->next.data + n * a->next.row + first * a->next.span, width * a->next.span);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            if (visible_only && p[r] == 0 && signbit(p[r]))
                continue;
#pragma GCC unroll 4
            for (int i = 0; i < width; i++)
                sums[r][i] += p[r] * v[i];
        }
    }
    vec *out = a->out + first;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++, out += a->vectors)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++)
            out[i] = a->fresh ? sums[r][i] : out[i] + sums[r][i];
}

FA_INLINE void add_rows_of_values(const value_product *a, fa_dtype dtype, int rows, bool visible_only)
{
    int i = 0;
    for (; i + VALUE_VECTORS(rows) <= a->vectors; i += VALUE_VECTORS(rows))
        add_values(a, i, dtype, rows, VALUE_VECTORS(rows), visible_only);
    for (; i + 2 <= a->vectors; i += 2)
        add_values(a, i, dtype, rows, 2, visible_only);
    if (i < a->vectors)
        add_values(a, i, dtype, rows, 1, visible_only);
}

/* One inlined copy for each number of rows and each dtype of keys and values. */
FA_INLINE void add_values_of(const value_product *a, fa_dtype dtype, int rows, bool visible_only)
{
    if (visible_only)
        add_rows_of_values(a, dtype, rows, true);
    else if (dtype == FA_FLOAT16)
        add_rows_of_values(a, FA_FLOAT16, rows, false);
    else if (dtype == FA_BFLOAT16)
        add_rows_of_values(a, FA_BFLOAT16, rows, false);
    else if (dtype == FA_INT8)
        add_rows_of_values(a, FA_INT8, rows, false);
    else
        add_rows_of_values(a, FA_REAL_DTYPE, rows, false);
}

static void add_values_any(const value_product *a, fa_dtype dtype, int rows, bool visible_only)
{
    if (NARROW_ROWS >= 8 && rows == 8)
        add_values_of(a, dtype, 8, visible_only);
    else if (NARROW_ROWS >= 4 && rows == 4)
        add_values_of(a, dtype, 4, visible_only);
    else if (NARROW_ROWS >= 2 && rows == 2)
        add_values_of(a, dtype, 2, visible_only);
    else
        add_values_of(a, dtype, 1, visible_only);
}

/* Multiplies the panel's rows by the scales of their keys, or of their values. */
static void multiply_by_scales(const tile *t, const key_range *range, const operand_block *block, vec *panel)
{
    real lanes[(KEY_BLOCK + LANES) * NARROW_ROWS + LANES];
    const int keys = (int)(range->last - range->first);
    for (int n = 0; n < keys; n++) { /* later keys overwrite what is too much */
        int64_t key = min_i64(max_i64(range->first + n, range->key_lo), range->key_hi - 1);
        const char *scale = block->scale + (key - block->first) * block->scale_step;
        vec_store(lanes + n * t->narrow, vec_splat(load_element(scale, FA_FLOAT32)));
    }
    for (int v = 0; v < keys >> t->key_shift; v++)
        panel[v] *= vec_load(lanes + v * LANES);
}

/* Scores of all keys of the range, as multiply_query_key. */
FA_INLINE void dot_range(const fa_problem *p, const tile *t, const key_range *range, const operand_block *key,
                         const lookahead *ahead, fa_dtype dtype, int rows, real scale, vec *scores)
{
    const int keys = LANES / rows;
    request next = {ahead->key, p->key.row, prefetch_span(p->key.col, p->head_dim), 0};
    prefetch_queries(p, ahead, 0, ahead->query_rows);
    for (int n = 0; range->first + n < range->last; n += keys) {
        const char *k[LANES];
        for (int j = 0; j < keys; j++) {
            int64_t index = min_i64(max_i64(range->first + n + j, range->key_lo), range->key_hi - 1);
            k[j] = key->data + (index - key->first) * key->row;
        }
        next.count = (int)max_i64(min_i64(ahead->key_rows - n, keys), 0);
        if (next.count > 0)
            next.data = ahead->key + n * next.row;
        scores[n / keys] = dot_keys(k, dtype, t->query, key_vectors(p->head_dim), rows, &next) * scale;
    }
}

FA_INLINE void dot_range_of(const fa_problem *p, const tile *t, const key_range *range,
                            const operand_block *key, const lookahead *ahead, int rows, real scale,
                            vec *scores)
{
    if (PRODUCTS_IN_BFLOAT16)
        dot_range(p, t, range, key, ahead, FA_BFLOAT16, rows, scale, scores);
    else if (key->dtype == FA_FLOAT16)
        dot_range(p, t, range, key, ahead, FA_FLOAT16, rows, scale, scores);
    else if (key->dtype == FA_BFLOAT16)
        dot_range(p, t, range, key, ahead, FA_BFLOAT16, rows, scale, scores);
    else if (key->dtype == FA_INT8)
        dot_range(p, t, range, key, ahead, FA_INT8, rows, scale, scores);
    else
        dot_range(p, t, range, key, ahead, FA_REAL_DTYPE, rows, scale, scores);
}

static void multiply_narrow_query_key(const fa_problem *p, const tile *t, const key_range *range,
                                      const operand_block *key, const lookahead *ahead, real scale,
                                      vec *scores)
{
    if (NARROW_ROWS >= 8 && t->narrow == 8)
        dot_range_of(p, t, range, key, ahead, 8, scale, scores);
    else if (NARROW_ROWS >= 4 && t->narrow == 4)
        dot_range_of(p, t, range, key, ahead, 4, scale, scores);
    else if (NARROW_ROWS >= 2 && t->narrow == 2)
        dot_range_of(p, t, range, key, ahead, 2, scale, scores);
    else
        dot_range_of(p, t, range, key, ahead, 1, scale, scores);
    if (key->scale)
        multiply_by_scales(t, range, key, scores);
}

/* out (+)= probabilities · V over the keys of the range. */
static void multiply_narrow_value(const fa_problem *p, const tile *t, const key_range *range,
                                  const operand_block *value, vec *probabilities, const lookahead *ahead,
                                  bool visible_only)
{
    if (value->scale)
        multiply_by_scales(t, range, value, probabilities);
    const bool is_dense = prefetch_span(p->value.col, p->head_dim_v) > 0;
    value_product product = {
        .value = value->data + (range->key_lo - value->first) * value->row,
        .row = value->row,
        .p = (const real *)probabilities + (range->key_lo - range->first) * t->narrow,
        .num_keys = (int)(range->key_hi - range->key_lo),
        .vectors = vectors_of(p->head_dim_v),
        .fresh = t->fresh,
        .out = t->out,
        .next = {ahead->value, p->value.row, is_dense ? LANES * p->value.col : 0, ahead->key_rows},
    };
    add_values_any(&product, value->dtype, t->narrow, visible_only);
}

#endif

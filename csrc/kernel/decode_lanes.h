/* Products of a decode tile in the vector units. Lanes run along the head dims in both products, and a score
 * is a sum over lanes. A row of the score panel holds LANES / rows_pow2 keys, key by key, `rows_pow2` rows
 * each.
 *
 * Requires tile.h; provides the products of decode.h. */
#include "for_editors.h"

#ifndef FA_KERNEL_DECODE_LANES_H
#define FA_KERNEL_DECODE_LANES_H

#include "specialise.h"
#include "tile.h"

/* Keys that are read side by side, a vector of each at a time: for some rows all those of a vector of scores,
 * so that a vector of queries, once there, serves them all. For one row memory serves keys one by one best;
 * but where bytes are upcast, arithmetic is dearer than reading. */
FA_INLINE int key_unroll(fa_dtype dtype, int rows)
{
    if (rows > 1)
        return LANES / rows;
    return fa_traits(dtype).is_dear ? 4 : 1;
}

/* sums[g * rows + r] += lane by lane products of key g and row r, of the vectors that are read at once, at
 * `offset` in a row of keys. In registers: a load beside each multiply-add would be one too many. */
FA_INLINE void multiply_keys(const char *const *key, ptrdiff_t offset, fa_dtype dtype,
                             const packed_vec *query, int rows, vec *sums)
{
#pragma GCC unroll 2
    for (int i = 0; i < vectors_per_load(dtype); i++, query += rows) {
        packed_vec q[DECODE_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            q[r] = (packed_vec)vec_in_register((vec)query[r]);
#pragma GCC unroll 16
        for (int g = 0; g < key_unroll(dtype, rows); g++) {
            packed_vec k = load_key_vector(key[g] + offset, dtype, i);
            if (rows > 1)
                k = (packed_vec)vec_in_register((vec)k);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                sums[g * rows + r] = multiply_lanes(k, q[r], sums[g * rows + r]);
        }
    }
}

/* sums[g * rows + r] = Σ_d key[g][d] query[r][d], lane by lane. Prefetches as many keys from `prefetch` on.
 */
FA_INLINE void dot_unrolled_keys(const char *const *key, fa_dtype dtype, const packed_vec *query, int vectors,
                                 int rows, const line_prefetch *requests, const char *prefetch, vec *sums)
{
    const int at_once = vectors_per_load(dtype), step = key_vector_bytes(dtype);
    const int unroll = key_unroll(dtype, rows);
#pragma GCC unroll 16
    for (int i = 0; i < unroll * rows; i++)
        sums[i] = vec_splat(0);
#pragma GCC unroll 4
    for (int d = 0; d < vectors; d += at_once) {
        if (d * step % 64 == 0 && prefetches_lines(dtype, rows, requests->hint)) {
#pragma GCC unroll 16
            for (int g = 0; g < unroll; g++)
                prefetch_line(prefetch + g * requests->next_key, requests->hint);
            prefetch += requests->next_line;
        }
        multiply_keys(key, d * step, dtype, query + d * rows, rows, sums);
    }
}

/* Lane j * rows + r: Σ_d key[n + j][d] query[r][d]. */
FA_INLINE vec dot_keys(const product_rows *keys, int n, fa_dtype dtype, const packed_vec *query, int vectors,
                       int rows, const line_prefetch *prefetch)
{
    const int unroll = key_unroll(dtype, rows);
    vec sums[LANES];
#pragma GCC unroll 1
    for (int j = 0; j < LANES / rows; j += unroll) {
        const char *k[LANES];
        vec unrolled_sums[LANES]; /* in registers, unlike those that a loop goes through */
        product_row_pointers(keys, n + j, unroll, k);
        dot_unrolled_keys(k, dtype, query, vectors, rows, prefetch, prefetch->data + j * prefetch->row,
                          unrolled_sums);
#pragma GCC unroll 16
        for (int i = 0; i < unroll * rows; i++)
            sums[j * rows + i] = unrolled_sums[i];
    }
    return vec_sums(sums);
}

/* Vectors of a row of values that are summed at once, for all rows: in half the registers at most. */
#define VALUE_SUMS (FA_VECTOR_BYTES / 4)
#define VALUE_VECTORS(rows) (VALUE_SUMS / (rows) < 8 ? VALUE_SUMS / (rows) : 8)

/* Values whose rows are summed before others are read: so few that a second pass over them, for more of their
 * columns, finds them in L1, and that what is prefetched is not prefetched too late. */
#define VALUE_BLOCK 32

/* out[r][i] (+)= Σ_n p[n][r] value[n][i] over the vectors i of a row, and the keys [lead, num_keys). */
typedef struct {
    const char *value; /* of key 0, which cannot be read if lead is 1 */
    ptrdiff_t row;
    const operand *p; /* [key / VALUE_KEYS][row] */
    int lead, num_keys;
    int vectors;
    bool empty; /* out is not there yet */
    vec *out;
    prefetch_plan prefetch;
    line_hint hint;
} value_product;

/* Values of which a part is prefetched, `width` vectors of each. */
FA_INLINE void prefetch_values(const char *prefetch, ptrdiff_t next, ptrdiff_t vector_bytes, int width,
                               line_hint hint)
{
#pragma GCC unroll 2
    for (int k = 0; k < VALUE_KEYS; k++)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            if (i * vector_bytes % 64 == 0)
                prefetch_line(prefetch + k * next + i * vector_bytes, hint);
}

/* sums[r][i] += p[r] value[i], of the keys that are multiplied at once. nan_safe: where p is -0 the key
 * is hidden from the row, and its value, be it NaN, adds nothing. */
FA_INLINE void add_value(const packed_vec v[8], const operand *p, int rows, int width, bool nan_safe,
                         vec sums[8][8])
{
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            sums[r][i] = multiply_add(p[r], nan_safe ? mask_values(p[r], v[i]) : v[i], sums[r][i]);
}

/* `width` vectors of all keys, from `first` on. Of rows that touch, as many bytes are prefetched one
 * after another, as memory serves them best. */
FA_INLINE void add_values(const value_product *a, int first, fa_dtype dtype, int rows, int width,
                          bool nan_safe)
{
    vec sums[8][8];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            sums[r][i] = vec_splat(0);
    const ptrdiff_t vector_bytes = LANES * element_size(dtype), offset = first * vector_bytes;
    const char *value = a->value + offset;
    const operand *p = a->p;
    for (int n = 0; n < a->num_keys;) {
        const product_prefetch run = prefetch_step(&a->prefetch, n);
        const int end = n + (int)min_i64(run.rows, a->num_keys - n);
        const bool touch = run.row == a->vectors * vector_bytes;
        const char *prefetch = run.data + (touch ? (end - n) * offset : offset);
        const ptrdiff_t next = touch ? width * vector_bytes : run.row;
        for (; n < end;
             n += VALUE_KEYS, value += VALUE_KEYS * a->row, prefetch += VALUE_KEYS * next, p += rows) {
            /* of keys that may not be read, the other one, which their probability hides */
            const char *even = n < a->lead ? value + a->row : value;
            const char *odd = n + 1 < a->num_keys ? value + a->row : value;
            packed_vec v[8];
            if (prefetches_lines(dtype, rows, a->hint))
                prefetch_values(prefetch, next, vector_bytes, width, a->hint);
            load_values(even, odd, dtype, width, v);
#pragma GCC unroll 8
            for (int i = 0; i < width && rows > 1; i++) /* as for keys */
                v[i] = (packed_vec)vec_in_register((vec)v[i]);
            add_value(v, p, rows, width, nan_safe, sums);
        }
    }
    vec *out = a->out + first;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++, out += a->vectors)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            out[i] = a->empty ? sums[r][i] : out[i] + sums[r][i];
}

/* nan_safe is rare, and goes by few vectors at a time, which are the smaller copies. */
FA_INLINE void add_rows_of_values(const value_product *a, fa_dtype dtype, int rows, bool nan_safe)
{
    int i = 0;
    for (; !nan_safe && i + VALUE_VECTORS(rows) <= a->vectors; i += VALUE_VECTORS(rows))
        add_values(a, i, dtype, rows, VALUE_VECTORS(rows), false);
    for (; !nan_safe && VALUE_VECTORS(rows) > 4 && i + 4 <= a->vectors; i += 4)
        add_values(a, i, dtype, rows, 4, false);
    for (; i + 2 <= a->vectors; i += 2)
        add_values(a, i, dtype, rows, 2, nan_safe);
    if (i < a->vectors)
        add_values(a, i, dtype, rows, 1, nan_safe);
}

/* Dtypes of keys and values that come to this kernel's decode tiles. */
FA_INLINE bool decode_takes(fa_dtype dtype)
{
    if (PRODUCTS_IN_BFLOAT16)
        return dtype == FA_BFLOAT16;
    return dtype == FA_REAL_DTYPE || (FA_REAL_BYTES == 4 && dtype != FA_FLOAT64);
}

static void add_values_any(const value_product *a, fa_dtype dtype, int rows, bool nan_safe)
{
    if (nan_safe) {
        WITH_DECODE_ROWS(rows, add_rows_of_values(a, dtype, ROWS, true));
        return;
    }
    WITH_DECODE_ROWS(rows, WITH_DTYPE(dtype, decode_takes, add_rows_of_values(a, DTYPE, ROWS, false)));
}

/* Scores of all keys of the range, as multiply_query_key. */
FA_INLINE void dot_range(const fa_problem *p, const tile *t, const key_range *range, const operand_block *key,
                         const next_streams *next, fa_dtype dtype, int rows, real scale, vec *scores)
{
    const int keys = LANES / rows, vectors = key_vectors(p->head_dim);
    const ptrdiff_t row_bytes = vectors * key_vector_bytes(dtype);
    const line_hint hint = hint_for_lines(dtype, rows);
    const product_rows a = key_rows(range, key);
    prefetch_plan plan;
    stream_ahead(&plan, next->streams, !is_vector_aligned(&p->key, p->head_dim),
                 key->data + (range->key_lo - key->first) * key->row);
    shared_streams shared = {.count = 0};
    share_stream(&shared, &next->query, next->query.count);
    share_stream(&shared, &next->key_scale, next->key_scale.count);
    share_stream(&shared, &next->value_scale, next->value_scale.count);
    if (shared.count > 0)
        plan.shared = &shared;
    for (int n = 0; n < num_keys(range);) {
        const product_prefetch run = prefetch_step(&plan, n);
        line_prefetch prefetch = spread_lines(&run, row_bytes, key_unroll(dtype, rows), hint);
        const int end = n + (int)min_i64(run.rows, num_keys(range) - n);
        for (; n < end; n += keys, prefetch.data += keys * prefetch.row)
            scores[n / keys] = dot_keys(&a, n, dtype, t->query, vectors, rows, &prefetch) * scale;
    }
}

static void multiply_decode_keys(const fa_problem *p, const tile *t, const key_range *range,
                                 const operand_block *key, const next_streams *next, real scale, vec *scores)
{
    WITH_DECODE_ROWS(t->rows_pow2, WITH_DTYPE(key->dtype, decode_takes,
                                              dot_range(p, t, range, key, next, DTYPE, ROWS, scale, scores)));
}

static void add_decode_values(const fa_problem *p, const tile *t, const key_range *range,
                              const operand_block *value, vec *probabilities, const row_stream *streams,
                              bool nan_safe)
{
    const operand *p_of_rows =
        pack_decode_probabilities(probabilities, panel_rows(t, range, true), t->rows_pow2);
    value_product product = {
        .row = value->row,
        .vectors = vectors_of(p->head_dim_v),
        .empty = t->empty,
        .out = t->out,
        .hint = hint_for_lines(value->dtype, t->rows_pow2),
    };
    stream_ahead(&product.prefetch, streams, !is_vector_aligned(&p->value, p->head_dim_v), NULL);
    for (int64_t n = range->key_lo, end; n < range->key_hi; n = end) {
        end = min_i64((n / VALUE_BLOCK + 1) * VALUE_BLOCK, range->key_hi);
        const int64_t first = n / VALUE_KEYS * VALUE_KEYS;
        product.value = value->data + (first - value->first) * value->row;
        product.p = p_of_rows + (first - range->first) / VALUE_KEYS * t->rows_pow2;
        product.lead = (int)(n - first);
        product.num_keys = (int)(end - first);
        product.prefetch.rest.data = product.value + product.lead * value->row;
        add_values_any(&product, value->dtype, t->rows_pow2, nan_safe);
        product.prefetch.distance += product.num_keys;
        product.empty = false;
    }
}

/* The tile's packed queries, from the pointers to its rows: the vectors of a row are rows_pow2 apart. */
FA_INLINE void pack_decode_queries(char *const *rows, int rows_pow2, const fa_problem *p, real sign,
                                   packed_vec *query)
{
    for (int r = 0; r < rows_pow2; r++)
        pack_decode_query(rows[r], p, sign, rows_pow2, query + r);
}

/* The tile's output in the order of elements. */
FA_INLINE void order_decode_out(const fa_problem *p, const tile *t)
{
    if (!PRODUCTS_IN_BFLOAT16 && reads_deinterleaved(&p->value, p->head_dim_v))
        for (int64_t i = 0; i < out_vectors(t, p->head_dim_v); i += 2)
            interleave(t->out + i);
}

#endif

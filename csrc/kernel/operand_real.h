/* Products in `real`: the operand of the micro-kernel is one element, broadcast against a vector.
 *
 * Requires pack.h; provides operand, TILE_K and the packing of keys, values and queries. */
#include "for_editors.h"

#ifndef FA_KERNEL_OPERAND_H
#define FA_KERNEL_OPERAND_H

#include "pack.h"

typedef real operand;
typedef vec packed_vec;

/* Elements along the reduction axis that one operand holds. */
#define TILE_K 1
/* Bytes from a column of packed values to the next. */
#define PACKED_VALUE_COL ((ptrdiff_t)sizeof(operand))
#define KEY_STEP 1
#define VALUE_STEP 1
#define PRODUCTS_IN_BFLOAT16 0

FA_INLINE int64_t query_panel_rows(int64_t head_dim)
{
    return head_dim;
}

FA_INLINE vec multiply_add(operand a, packed_vec b, vec c)
{
    return c + a * b;
}

/* The same, but where b is -0, a is taken as 0: what it multiplies is masked, be it NaN. */
FA_INLINE vec multiply_add_nan_safe(operand a, packed_vec b, vec c)
{
    const ivec hidden = (ivec)vec_splat((real)-0.0);
    return c + (vec)((ivec)vec_splat(a) & ivec_nonzero((ivec)b ^ hidden)) * b;
}

/* Elements [d, d + count) of LANES rows, times `sign`, to columns[i * vectors]. A whole block stays in
 * registers, and is not inlined: in a loop, the compiler would keep an address for each row in memory. */
static __attribute__((noinline)) void pack_transposed(char *const *rows, ptrdiff_t offset, ptrdiff_t col,
                                                      int count, fa_dtype dtype, int vectors, real sign,
                                                      packed_vec *columns)
{
    vec x[LANES];
    if (dtype == FA_REAL_DTYPE && col == sizeof(real) && count == LANES) {
        load_whole_transposed(rows, offset, FA_REAL_DTYPE, x);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++, columns += vectors)
            *columns = x[i] * sign;
    } else {
        load_transposed(rows, offset, col, count, dtype, x);
        for (int i = 0; i < count; i++, columns += vectors)
            *columns = x[i] * sign;
    }
}

/* Row j of the tile at rows[j], as panel[d][m] lanes, times `sign` (1, -1 or 0: exact). */
FA_INLINE void pack_query(char *const *rows, ptrdiff_t col, fa_dtype dtype, int head_dim, int vectors,
                          real sign, packed_vec *query)
{
    for (int m = 0; m < vectors; m++)
        for (int d = 0; d < head_dim; d += LANES)
            pack_transposed(rows + m * LANES, d * col, col, head_dim - d < LANES ? head_dim - d : LANES,
                            dtype, vectors, sign, query + d * vectors + m);
}

/* Of a decode tile: a row of queries times `sign`, in vectors that end in zeros, `step` apart. */
FA_INLINE void pack_decode_vectors(const char *row, ptrdiff_t col, fa_dtype dtype, int head_dim, real sign,
                                   int step, packed_vec *query)
{
    for (int d = 0; d < head_dim; d += LANES, row += LANES * col, query += step)
        *query = load_elements(row, col, head_dim - d < LANES ? head_dim - d : LANES, dtype) * sign;
}

/* The same in the order in which a decode tile reads keys in twos. */
FA_INLINE void pack_decode_deinterleaved(const char *row, ptrdiff_t col, fa_dtype dtype, int head_dim,
                                         real sign, int step, packed_vec *query)
{
    for (int d = 0; d < head_dim; d += 2 * LANES, row += 2 * LANES * col, query += 2 * step) {
        vec x[2] = {load_elements(row, col, LANES, dtype),
                    load_elements(row + LANES * col, col, LANES, dtype)};
        deinterleave(x);
        query[0] = x[0] * sign;
        query[step] = x[1] * sign;
    }
}

/* Where dtype and stride are the usual, which are known to a copy of their own, a small call takes 7 %
 * less. */
FA_INLINE void pack_decode_query(const char *row, const fa_problem *p, real sign, int step, packed_vec *query)
{
    const ptrdiff_t col = p->query.col;
    const int head_dim = (int)p->head_dim;
    if (reads_deinterleaved(&p->key, head_dim))
        pack_decode_deinterleaved(row, col, p->query.dtype, head_dim, sign, step, query);
    else if (p->query.dtype == FA_REAL_DTYPE && col == sizeof(real))
        pack_decode_vectors(row, sizeof(real), FA_REAL_DTYPE, head_dim, sign, step, query);
    else
        pack_decode_vectors(row, col, p->query.dtype, head_dim, sign, step, query);
}

/* Vectors of a row of keys, and those that are read from the same bytes. */
FA_INLINE int key_vectors(int64_t head_dim)
{
    return vectors_of(head_dim);
}

FA_INLINE int vectors_per_load(fa_dtype dtype)
{
    return is_deinterleaved(dtype) ? 2 : 1;
}

FA_INLINE int key_vector_bytes(fa_dtype dtype)
{
    return LANES * element_size(dtype);
}

FA_INLINE packed_vec load_key_vector(const char *src, fa_dtype dtype, int i)
{
    return load_nth(src, dtype, i);
}

FA_INLINE vec multiply_lanes(packed_vec a, packed_vec b, vec c)
{
    return c + a * b;
}

/* Probabilities of rows n are a panel as they are. */
FA_INLINE const packed_vec *pack_probabilities(vec *scores, int num_keys, int vectors)
{
    (void)num_keys, (void)vectors;
    return scores;
}

/* Of a decode tile: keys whose values are multiplied at once. */
#define VALUE_KEYS 1

/* The panel of a decode tile as operands, [key][row]: as it is. */
FA_INLINE const operand *pack_decode_probabilities(vec *scores, int panel_rows, int rows_pow2)
{
    (void)panel_rows, (void)rows_pow2;
    return (const operand *)scores;
}

/* `width` vectors of a key's values. */
FA_INLINE void load_values(const char *value, const char *second, fa_dtype dtype, int width, packed_vec v[8])
{
    (void)second;
#pragma GCC unroll 8
    for (int i = 0; i < width; i++)
        v[i] = load_nth(value, dtype, i);
}

/* A key's values; 0 if its probability is -0: it is hidden, be its value NaN. */
FA_INLINE packed_vec mask_values(operand probability, packed_vec v)
{
    return probability == 0 && signbit(probability) ? vec_splat(0) : v;
}

/* Whether keys (and values) can be broadcast in place: if they need no conversion, and an element
 * shares its cache line with the next one of its row or its column. */
FA_INLINE bool key_is_operand(const fa_array *key, int64_t head_dim)
{
    (void)head_dim;
    const bool shares_lines = (key->col > -64 && key->col < 64) || (key->row > -64 && key->row < 64);
    return key->dtype == FA_REAL_DTYPE && shares_lines;
}

FA_INLINE ptrdiff_t operand_step(const fa_array *array)
{
    return array->col;
}

FA_INLINE bool value_is_operand(const fa_array *value)
{
    return key_is_operand(value, 0);
}

/* `lead` is always 0: keys go one by one. */
FA_INLINE void pack_key(const source_rows *key, int lead, int num_keys, int head_dim, char *packed)
{
    (void)lead;
    pack_rows(key, num_keys, head_dim, packed);
}

/* Keys and values that are packed at once. */
FA_INLINE int64_t packed_keys(const fa_problem *p)
{
    (void)p;
    return FA_KEY_BLOCK;
}

FA_INLINE int64_t packed_values(const fa_problem *p)
{
    return packed_keys(p);
}

FA_INLINE ptrdiff_t packed_key_row(int64_t head_dim)
{
    return packed_row_bytes(head_dim);
}

FA_INLINE ptrdiff_t packed_key_step(void)
{
    return sizeof(operand);
}

FA_INLINE ptrdiff_t packed_decode_row_bytes(int64_t head_dim)
{
    return packed_row_bytes(head_dim);
}

FA_INLINE void pack_decode_rows(const source_rows *src, int num_keys, int head_dim, char *packed)
{
    pack_rows(src, num_keys, head_dim, packed);
}

FA_INLINE ptrdiff_t packed_value_bytes(int64_t head_dim_v)
{
    return packed_row_bytes(head_dim_v);
}

FA_INLINE void pack_value(const source_rows *value, int lead, int num_keys, int head_dim_v, char *packed)
{
    (void)lead;
    pack_rows(value, num_keys, head_dim_v, packed);
}

#endif

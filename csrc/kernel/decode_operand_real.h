/* Operands of decode tiles in `real`: vectors of a row of queries, keys or values, in place or upcast.
 *
 * Requires pack.h; provides operand and the packing of decode tiles. */
#include "for_editors.h"

#ifndef FA_KERNEL_DECODE_OPERAND_REAL_H
#define FA_KERNEL_DECODE_OPERAND_REAL_H

#include "pack.h"

typedef real operand;
typedef vec packed_vec;

#define PRODUCTS_IN_BFLOAT16 0

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

FA_INLINE ptrdiff_t packed_decode_row_bytes(int64_t head_dim)
{
    return packed_row_bytes(head_dim);
}

FA_INLINE void pack_decode_rows(const source_rows *src, int num_keys, int head_dim, char *packed)
{
    pack_rows(src, num_keys, head_dim, packed);
}

#endif

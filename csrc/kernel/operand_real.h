/* Products in `real`: the operand of the micro-kernel is one element, broadcast against a vector. */
#ifndef FA_KERNEL_OPERAND_H
#define FA_KERNEL_OPERAND_H

#include "elements.h"

typedef real operand;
typedef vec panel;

/* Elements along the reduction axis that one operand holds. */
#define REDUCTION 1

FA_INLINE vec multiply_add(operand a, panel b, vec c)
{
    return c + a * b;
}

/* The same, but where b is -0, a is taken as 0: what it multiplies is masked, be it NaN. */
FA_INLINE vec multiply_add_visible(operand a, panel b, vec c)
{
    const ivec hidden = (ivec)vec_splat((real)-0.0);
    return c + (vec)((ivec)vec_splat(a) & ivec_nonzero((ivec)b ^ hidden)) * b;
}

/* Row j of the tile at rows[j], as panel[d][m] lanes, times `sign` (1, -1 or 0: exact). */
FA_INLINE void pack_query(char *const *rows, ptrdiff_t col, fa_dtype dtype, int head_dim, int vectors,
                          real sign, panel *query)
{
    for (int m = 0; m < vectors; m++) {
        for (int d = 0; d < head_dim; d += LANES) {
            int count = head_dim - d < LANES ? head_dim - d : LANES;
            vec x[LANES];
            load_square(rows + m * LANES, d * col, col, count, dtype, x);
            for (int j = 0; j < count; j++)
                query[(d + j) * vectors + m] = x[j] * sign;
        }
    }
}

/* Probabilities of rows n are a panel as they are. */
FA_INLINE const panel *pack_probabilities(vec *scores, int num_keys, int vectors)
{
    (void)num_keys, (void)vectors;
    return scores;
}

/* Whether keys (and values) can be broadcast from where they lie: always, if they need no conversion.
 * The stride matters only to the cache. */
FA_INLINE bool key_is_operand(const fa_array *key, int64_t head_dim)
{
    (void)head_dim;
    return key->dtype == FA_REAL_DTYPE;
}

FA_INLINE ptrdiff_t operand_step(const fa_array *array)
{
    return array->col;
}

FA_INLINE bool value_is_operand(const fa_array *value)
{
    return key_is_operand(value, 0);
}

FA_INLINE ptrdiff_t staged_row_bytes(int64_t head_dim)
{
    return (head_dim + LANES - 1) / LANES * FA_VECTOR_BYTES;
}

/* Widens `num_keys` rows into [n][d]. */
FA_INLINE void stage_rows(const char *src, const fa_array *array, int num_keys, int head_dim, char *stage)
{
    for (int n = 0; n < num_keys; n++) {
        const char *row = src + n * array->row;
        char *dst = stage + n * staged_row_bytes(head_dim);
        for (int d = 0; d < head_dim; d += LANES) {
            int count = head_dim - d < LANES ? head_dim - d : LANES;
            vec x = load_elements(row + d * array->col, array->col, count, array->dtype);
            vec_store(dst + d * (int)sizeof(real), x);
        }
    }
}

FA_INLINE void stage_key(const char *src, const fa_array *key, int num_keys, int head_dim, char *stage)
{
    stage_rows(src, key, num_keys, head_dim, stage);
}

/* `lead` is always 0: keys go one by one. */
FA_INLINE void stage_value(const char *src, const fa_array *value, int lead, int num_keys, int head_dim_v,
                           char *stage)
{
    (void)lead;
    stage_rows(src, value, num_keys, head_dim_v, stage);
}

#endif

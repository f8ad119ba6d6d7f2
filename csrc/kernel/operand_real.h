/* Products in `real`: the operand of the micro-kernel is one element, broadcast against a vector.
 *
 * Requires pack.h; provides TILE_K and the packing of keys, values and queries. */
#include "for_editors.h"

#ifndef FA_KERNEL_OPERAND_H
#define FA_KERNEL_OPERAND_H

#include "decode_operand_real.h"

/* Elements along the reduction axis that one operand holds. */
#define TILE_K 1
#define VALUE_STEP 1

FA_INLINE int64_t query_panel_rows(int64_t head_dim)
{
    return head_dim;
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

/* Probabilities of rows n are a panel as they are. */
FA_INLINE const packed_vec *pack_probabilities(vec *scores, int num_keys, int vectors)
{
    (void)num_keys, (void)vectors;
    return scores;
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

FA_INLINE void pack_value(const source_rows *value, int lead, int num_keys, int head_dim_v, char *packed)
{
    (void)lead;
    pack_rows(value, num_keys, head_dim_v, packed);
}

/* Of row 0, `count` columns at `offset` as lanes; 0 beyond. Of pairs: of rows 0 and 1. */
FA_INLINE packed_vec pack_row_operands(char *const *rows, ptrdiff_t offset, ptrdiff_t col, fa_dtype dtype,
                                       int count)
{
    return load_elements(rows[0] + offset, col, count, dtype);
}

/* Rows of a score panel as operands, in place. Of pairs: rounded, at `to`. */
FA_INLINE const char *round_panel_rows(const vec *panel, int rows, int vectors, char *to)
{
    (void)rows, (void)vectors, (void)to;
    return (const char *)panel;
}

/* multiply_add, but where a is 0, what it meets is hidden, be it NaN. */
FA_INLINE vec multiply_add_visible(operand a, packed_vec b, vec c)
{
    return a == 0 ? c : multiply_add(a, b, c);
}

#include "operand_rows.h"

#endif

/* Products of bfloat16 pairs: the operand of the micro-kernel is a pair along the reduction axis, broadcast
 * against lanes of pairs. Keys lie in pairs already; values are interleaved by two keys.
 *
 * Requires dot_pairs and round_pairs; provides operand, TILE_K and the packing of keys and values. */
#include "for_editors_bf16dot.h"

#ifndef FA_KERNEL_OPERAND_H
#define FA_KERNEL_OPERAND_H

#include "pairs.h"

#define TILE_K 2
#define VALUE_STEP 2

FA_INLINE bool key_is_operand(const fa_array *key, int64_t head_dim)
{
    return key->col == 2 && head_dim % 2 == 0;
}

FA_INLINE ptrdiff_t operand_step(const fa_array *array)
{
    (void)array;
    return sizeof(operand);
}

FA_INLINE bool value_is_operand(const fa_array *value)
{
    (void)value;
    return false;
}

/* pack_value without a lead, by blocks, which are transposed. */
FA_INLINE void pack_value_transposed(const source_rows *src, int num_keys, int head_dim_v, char *packed)
{
    const fa_array *value = src->array;
    for (int n = 0; n < num_keys; n += 2 * LANES) {
        for (int e = 0; e < head_dim_v; e += LANES) {
            vec x[LANES];
            for (int j = 0; j < LANES; j++)
                x[j] = (vec)load_pairs(src->data + n * value->row + (e + j) * value->col, value->row,
                                       e + j < head_dim_v ? num_keys - n : 0);
            vec_transpose(x);
            for (int i = 0; i < LANES && n + 2 * i < num_keys; i++)
                vec_store(packed + (n / 2 + i) * packed_row_bytes(head_dim_v) + 4 * e, x[i]);
        }
    }
}

/* Two rows without gaps, `row` bytes apart, in pairs, as far as they fill whole vectors: so many elements. */
FA_INLINE int interleave_rows(const char *src, ptrdiff_t row, int head_dim_v, char *dst)
{
    int e = 0;
    for (; e + 2 * LANES <= head_dim_v; e += 2 * LANES)
        interleave_keys(src + 2 * e, src + row + 2 * e, (packed_vec *)(dst + 4 * e));
    return e;
}

/* pack_value where there is nothing else than that, and nothing to ask at each pair of rows. */
FA_INLINE void pack_whole_values(const source_rows *src, int num_keys, int head_dim_v, char *packed)
{
    const ptrdiff_t row = src->array->row;
    for (int n = 0; n < num_keys; n += 2)
        interleave_rows(src->data + n * row, row, head_dim_v, packed + n / 2 * packed_row_bytes(head_dim_v));
}

/* Interleaves rows by two keys. `lead` = 1: the first pair lacks its first key. A missing key is 0. */
FA_INLINE void pack_value(const source_rows *src, int lead, int num_keys, int head_dim_v, char *packed)
{
    const fa_array *value = src->array;
    if (is_transposed(value) && lead == 0) {
        pack_value_transposed(src, num_keys, head_dim_v, packed);
        return;
    }
    if (value->col == 2 && lead == 0 && num_keys % 2 == 0 && head_dim_v % (2 * LANES) == 0) {
        pack_whole_values(src, num_keys, head_dim_v, packed);
        return;
    }
    for (int n = -lead; n < num_keys; n += 2) {
        const char *row = src->data + n * value->row;
        char *dst = packed + (n + lead) / 2 * packed_row_bytes(head_dim_v);
        const bool both = n >= 0 && n + 1 < num_keys;
        int e = 0;
        if (both && value->col == 2)
            e = interleave_rows(row, value->row, head_dim_v, dst);
        for (; e < head_dim_v; e += LANES) {
            uvec low = {0}, high = {0};
            if (n >= 0)
                low = load_halves(row + e * value->col, value->col, head_dim_v - e);
            if (n + 1 < num_keys)
                high = load_halves(row + value->row + e * value->col, value->col, head_dim_v - e);
            vec_store(dst + e * 4, (vec)make_pairs(low, high));
        }
    }
}

/* `count` columns at `offset` of rows 0 and 1, in pairs, as lanes; 0 beyond. */
FA_INLINE packed_vec pack_row_operands(char *const *rows, ptrdiff_t offset, ptrdiff_t col, fa_dtype dtype,
                                       int count)
{
    (void)dtype;
    return make_pairs(load_halves(rows[0] + offset, col, count), load_halves(rows[1] + offset, col, count));
}

/* Rows of a score panel as pairs of lanes, rounded, at `to`. */
FA_INLINE const char *round_panel_rows(const vec *panel, int rows, int vectors, char *to)
{
    for (int i = 0; i < rows * vectors; i++)
        store_contiguous(to + i * 2 * LANES, FA_BFLOAT16, panel[i]);
    return to;
}

/* multiply_add, but where half of a is 0, what it meets is hidden, be it NaN. */
FA_INLINE vec multiply_add_visible(operand a, packed_vec b, vec c)
{
    const uint32_t low = a & 0x7fff ? 0xffff : 0, high = a & 0x7fff0000 ? 0xffff0000 : 0;
    return multiply_add(a, b & (low | high), c);
}

#include "operand_rows.h"

#endif

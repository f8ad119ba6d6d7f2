/* Products of bfloat16 pairs in the tile unit (AMX), which multiplies 16 rows of 32 elements by 32 rows of 16
 * lanes: the operand is 32 elements along the reduction axis. Keys are packed with rows of zeros up to
 * multiples of 32; values are transposed, 32 keys at a time. */
#ifndef FA_KERNEL_OPERAND_H
#define FA_KERNEL_OPERAND_H

#include "pairs.h"

#define TILE_K 32
/* Bytes from a column of packed values to the next. */
#define PACKED_VALUE_COL FA_VECTOR_BYTES
#define KEY_STEP 32

FA_INLINE bool key_is_operand(const fa_array *key, int64_t head_dim)
{
    (void)key, (void)head_dim;
    return false;
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

FA_INLINE void pack_key(const source_rows *key, int lead, int num_keys, int head_dim, char *packed)
{
    const int end = lead + num_keys, padding = (KEY_STEP - end % KEY_STEP) % KEY_STEP;
    pack_pairs(key, lead, num_keys, head_dim, packed);
    memset(packed + end * packed_row_bytes(head_dim), 0, (size_t)(padding * packed_row_bytes(head_dim)));
}

/* Of TILE_K keys: [head_dim_v][TILE_K], in whole vectors of columns. */
FA_INLINE ptrdiff_t packed_value_bytes(int64_t head_dim_v)
{
    return packed_row_bytes(head_dim_v) * LANES;
}

/* Keys first, first + 1 of the group of TILE_K, as pairs of LANES columns from e on; a missing key is 0.
 */
FA_INLINE uvec load_key_pair(const source_rows *src, int first, int num_keys, int e, int head_dim_v)
{
    const fa_array *value = src->array;
    const char *row = src->data + first * value->row + e * value->col;
    uvec low = {0}, high = {0};
    if (first >= 0 && first < num_keys)
        low = load_halves(row, value->col, head_dim_v - e);
    if (first + 1 >= 0 && first + 1 < num_keys)
        high = load_halves(row + value->row, value->col, head_dim_v - e);
    return make_pairs(low, high);
}

/* Transposes groups of TILE_K keys, of which the first lacks its first `lead` ones. */
FA_INLINE void pack_value(const source_rows *src, int lead, int num_keys, int head_dim_v, char *packed)
{
    for (int n = -lead; n < num_keys; n += TILE_K, packed += packed_value_bytes(head_dim_v)) {
        for (int e = 0; e < head_dim_v; e += LANES) {
            vec x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = (vec)load_key_pair(src, n + 2 * i, num_keys, e, head_dim_v);
            vec_transpose(x);
            for (int i = 0; i < LANES; i++)
                vec_store(packed + (e + i) * FA_VECTOR_BYTES, x[i]);
        }
    }
}

#endif

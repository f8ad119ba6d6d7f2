/* Products of bfloat16 pairs: the operand of the micro-kernel is a pair along the reduction axis, broadcast
 * against lanes of pairs. Keys lie in pairs already; values are interleaved by two keys. */
#ifndef FA_KERNEL_OPERAND_H
#define FA_KERNEL_OPERAND_H

#include "pairs.h"

#define REDUCTION 2
#define KEY_STEP 1

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

FA_INLINE void stage_key(const source_rows *key, int lead, int num_keys, int head_dim, char *stage)
{
    stage_pairs(key, lead, num_keys, head_dim, stage);
}

FA_INLINE ptrdiff_t staged_value_bytes(int64_t head_dim_v)
{
    return staged_row_bytes(head_dim_v);
}

/* Interleaves rows by two keys. `lead` = 1: the first pair lacks its first key. A missing key is 0. */
FA_INLINE void stage_value(const source_rows *src, int lead, int num_keys, int head_dim_v, char *stage)
{
    const fa_array *value = src->array;
    for (int n = -lead; n < num_keys; n += 2) {
        const char *row = src->data + n * value->row;
        char *dst = stage + (n + lead) / 2 * staged_row_bytes(head_dim_v);
        for (int e = 0; e < head_dim_v; e += LANES) {
            uvec low = {0}, high = {0};
            if (n >= 0)
                low = load_halves(row + e * value->col, value->col, head_dim_v - e);
            if (n + 1 < num_keys)
                high = load_halves(row + value->row + e * value->col, value->col, head_dim_v - e);
            vec_store(dst + e * 4, (vec)(low | high << 16));
        }
    }
}

#endif

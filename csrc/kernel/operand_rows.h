/* What operands of multiply-adds share: keys and values are packed a block at a time, in rows, and keys one
 * by one.
 *
 * Included last by operand_real.h and operand_bf16dot.h.
 *
 * Requires operand, TILE_K, pack_decode_rows and packed_decode_row_bytes; provides the rest of the packing of
 * keys, and the sizes. */
#include "for_editors.h"

#ifndef FA_KERNEL_OPERAND_ROWS_H
#define FA_KERNEL_OPERAND_ROWS_H

#include "pack.h"

#define MAX_PARTS 1
#define PROBABILITY_PANELS 1
#define KEY_STEP 1

/* Bytes from a column of packed values to the next. */
#define PACKED_VALUE_COL ((ptrdiff_t)sizeof(operand))

/* `lead` is always 0. */
FA_INLINE void pack_key(const source_rows *key, int lead, int num_keys, int head_dim, char *packed)
{
    (void)lead;
    pack_decode_rows(key, num_keys, head_dim, packed);
}

/* Of a block that a product reads along its columns. */
FA_INLINE size_t row_block_bytes(int64_t columns)
{
    return (size_t)(FA_KEY_BLOCK * packed_decode_row_bytes(columns));
}

/* Of what is packed at once: a block. */
FA_INLINE size_t wide_key_bytes(const fa_problem *p)
{
    return row_block_bytes(p->head_dim);
}

FA_INLINE size_t wide_value_bytes(const fa_problem *p)
{
    return (size_t)(FA_KEY_BLOCK / TILE_K * packed_row_bytes(p->head_dim_v));
}

FA_INLINE ptrdiff_t packed_key_row(int64_t head_dim)
{
    return packed_decode_row_bytes(head_dim);
}

FA_INLINE ptrdiff_t packed_key_step(void)
{
    return sizeof(operand);
}

FA_INLINE ptrdiff_t packed_value_bytes(int64_t head_dim_v)
{
    return packed_row_bytes(head_dim_v);
}

#endif

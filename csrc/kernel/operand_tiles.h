/* What operands of the tile unit share: keys and values are packed as tiles of 16 rows of 64 bytes, part by
 * part, a superblock at a time.
 *
 * Included by operand_amx.h and operand_split.h.
 *
 * Requires MAX_PARTS, DECODE_ROWS, PACKED_RANGE_BYTES, MAX_SUPERBLOCK_BYTES and key_is_operand; provides the
 * sizes. */
#include "for_editors_amx.h"

#ifndef FA_KERNEL_OPERAND_TILES_H
#define FA_KERNEL_OPERAND_TILES_H

#include "pack.h"

/* Bytes from a column of packed values to the next. */
#define PACKED_VALUE_COL FA_VECTOR_BYTES
#define KEY_STEP FA_KEY_BLOCK
#define VALUE_STEP FA_KEY_BLOCK

/* Keys that are packed at once, for all tiles of an item: so many that the scratch stays small and K, V and a
 * tile stay in L2. */
#define MAX_SUPERBLOCK_KEYS 2048

FA_INLINE ptrdiff_t operand_step(const fa_array *array)
{
    (void)array;
    return FA_VECTOR_BYTES;
}

FA_INLINE bool value_is_operand(const fa_array *value)
{
    (void)value;
    return false;
}

FA_INLINE int64_t key_steps(int64_t head_dim)
{
    return (head_dim + TILE_K - 1) / TILE_K;
}

/* Of a part of the packed queries: [head_dim / 2][vectors], in whole tiles. */
FA_INLINE int64_t query_part_rows(int64_t head_dim)
{
    return key_steps(head_dim) * TILE_K / 2;
}

/* Packed keys are tiles: [head_dim / 32][KEY_BLOCK] rows of 64 bytes, which load fastest. */
FA_INLINE ptrdiff_t packed_key_row(int64_t head_dim)
{
    (void)head_dim;
    return FA_VECTOR_BYTES;
}

FA_INLINE ptrdiff_t packed_key_step(void)
{
    return FA_KEY_BLOCK * FA_VECTOR_BYTES;
}

FA_INLINE ptrdiff_t key_part_bytes(int64_t head_dim)
{
    return key_steps(head_dim) * packed_key_step();
}

/* Of a block. */
FA_INLINE ptrdiff_t packed_key_bytes(int64_t head_dim)
{
    return MAX_PARTS * key_part_bytes(head_dim) + PACKED_RANGE_BYTES;
}

FA_INLINE size_t row_block_bytes(int64_t columns)
{
    return (size_t)packed_key_bytes(columns);
}

/* Of TILE_K keys: [head_dim_v][TILE_K], in whole vectors of columns. */
FA_INLINE ptrdiff_t value_part_bytes(int64_t head_dim_v)
{
    return packed_row_bytes(head_dim_v) * LANES;
}

FA_INLINE ptrdiff_t packed_value_bytes(int64_t head_dim_v)
{
    return MAX_PARTS * value_part_bytes(head_dim_v);
}

FA_INLINE ptrdiff_t value_block_bytes(int64_t head_dim_v)
{
    return FA_KEY_BLOCK / TILE_K * packed_value_bytes(head_dim_v);
}

FA_INLINE int64_t superblock_keys(const fa_problem *p)
{
    const int64_t key = key_is_operand(&p->key, p->head_dim) ? 0 : packed_key_bytes(p->head_dim);
    const int64_t bytes = key + value_block_bytes(p->head_dim_v);
    const int64_t blocks = bytes > 0 ? MAX_SUPERBLOCK_BYTES / bytes : 1;
    return blocks * FA_KEY_BLOCK < MAX_SUPERBLOCK_KEYS ? blocks * FA_KEY_BLOCK : MAX_SUPERBLOCK_KEYS;
}

/* Of keys in place, those blocks are packed that are cut: the first and the last. */
FA_INLINE size_t wide_key_bytes(const fa_problem *p)
{
    const int64_t keys = key_is_operand(&p->key, p->head_dim) ? 2 * FA_KEY_BLOCK : superblock_keys(p);
    return (size_t)(keys / FA_KEY_BLOCK * packed_key_bytes(p->head_dim));
}

FA_INLINE size_t wide_value_bytes(const fa_problem *p)
{
    return (size_t)(superblock_keys(p) / FA_KEY_BLOCK * value_block_bytes(p->head_dim_v));
}

#endif

/* Products of bfloat16 in the tile unit (AMX), which multiplies 16 rows of 32 elements by 32 rows of 16
 * lanes: the operand is 32 elements along the reduction. Keys are read in place where they are whole tile
 * rows, else packed in rows that end in zeros; values are packed transposed, 32 keys to a row. A block that
 * is cut at its ends is packed whole, with zeros.
 *
 * Requires the tile unit's instruction set; provides operand, TILE_K and the packing of keys and values. */
#include "for_editors_amx.h"

#ifndef FA_KERNEL_OPERAND_H
#define FA_KERNEL_OPERAND_H

#include "pairs.h"

#define TILE_K 32
/* As many as a register of the unit has rows; see decode_tiles.h. */
#define DECODE_ROWS 16
#define DECODES_IN_TILES 1
/* Bits of a number that the unit multiplies: all. See operand_split.h. */
#define MAX_PARTS 1
/* All probabilities of a block are in registers before the next ones are stored. */
#define PROBABILITY_PANELS 1

/* Of packed keys and values, beside the tiles in L2. */
#define MAX_SUPERBLOCK_BYTES (7 << 16)

/* Rows 2048 bytes and more apart share sets of L1: a tile load of them takes 77 to 204 cycles, else 16 to 24
 * (Granite Rapids). */
#define MAX_TILE_ROW_STRIDE 2048

/* Whether keys are tile rows in place, whole cache lines: a row across two lines costs two loads (from L2, D
 * = 128: 30 % of the unit's peak, packed first 47 %). */
FA_INLINE bool key_is_operand(const fa_array *key, int64_t head_dim)
{
    ptrdiff_t offset = (ptrdiff_t)key->data | key->row | key->head | key->page;
    for (int axis = 0; axis < FA_MAX_BATCH_DIMS; axis++)
        offset |= key->batch[axis];
    return key->col == 2 && head_dim % TILE_K == 0 && key->row > 0 && key->row < MAX_TILE_ROW_STRIDE &&
           offset % 64 == 0;
}

#define PACKED_RANGE_BYTES 0

#include "operand_tiles.h"

FA_INLINE void pack_key(const source_rows *key, int lead, int num_keys, int head_dim, char *packed)
{
    const packed_pairs to = {packed, packed_key_row(head_dim), packed_key_step()};
    clear_pairs(&to, 0, lead, head_dim);
    pack_pairs(key, lead, num_keys, head_dim, &to);
    const int end = lead + num_keys;
    clear_pairs(&to, end, (end + TILE_K - 1) / TILE_K * TILE_K, head_dim);
}

/* Numbers are packed as they are. */
typedef struct {
    float factor;
    bool has_infinity;
} packed_range;

static const packed_range packed_as_is = {1, false};

FA_INLINE const float *range_factors(const packed_range *range)
{
    return &range->factor;
}

FA_INLINE const packed_range *query_range(const packed_vec *query, int64_t head_dim)
{
    (void)query, (void)head_dim;
    return &packed_as_is;
}

FA_INLINE const packed_range *key_range_at(const char *packed, int64_t head_dim)
{
    (void)packed, (void)head_dim;
    return &packed_as_is;
}

FA_INLINE int parts_of(fa_dtype dtype)
{
    (void)dtype;
    return MAX_PARTS;
}

/* Keys first, first + 1 of the group of TILE_K, as pairs of LANES columns from e on; a missing key is 0. */
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

/* TILE_K rows without gaps in them, `row` bytes apart, 32 columns at a time: pairs of rows are interleaved
 * within quarters of a vector, and transposed. */
static void pack_whole_value(const char *src, ptrdiff_t row, int head_dim_v, char *packed)
{
    for (int e = 0; e < head_dim_v;
         e += 2 * LANES, src += FA_VECTOR_BYTES, packed += 2 * LANES * FA_VECTOR_BYTES) {
        vec low[LANES], high[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            /* The next TILE_K rows: the CPU does not see through columns of 64 bytes. */
            __builtin_prefetch(src + (TILE_K + 2 * i) * row, 0, 2);
            __builtin_prefetch(src + (TILE_K + 2 * i + 1) * row, 0, 2);
            const vec a = vec_load(src + 2 * i * row), b = vec_load(src + (2 * i + 1) * row);
            low[i] = interleave_quarters_low(a, b);
            high[i] = interleave_quarters_high(a, b);
        }
        vec_transpose(low);
        vec_transpose(high);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            const int column = i / 4 * 8 + i % 4;
            vec_store(packed + column * FA_VECTOR_BYTES, low[i]);
            vec_store(packed + (column + 4) * FA_VECTOR_BYTES, high[i]);
        }
    }
}

/* Transposes groups of TILE_K keys, of which the first `lead` ones and those behind num_keys are missing. */
FA_INLINE void pack_value(const source_rows *src, int lead, int num_keys, int head_dim_v, char *packed)
{
    const fa_array *value = src->array;
    const bool dense = value->col == 2 && head_dim_v % (2 * LANES) == 0;
    for (int n = -lead; n < num_keys; n += TILE_K, packed += packed_value_bytes(head_dim_v)) {
        if (dense && n >= 0 && n + TILE_K <= num_keys) {
            pack_whole_value(src->data + n * value->row, value->row, head_dim_v, packed);
            continue;
        }
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

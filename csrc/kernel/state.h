/* The state of a work item: its tiles, its arrays, how its blocks of keys and values become operands, and
 * what is prefetched behind them.
 *
 * Requires item.h and softmax.h; provides item_state and what the three ways of attending share. */
#include "for_editors.h"

#ifndef FA_KERNEL_STATE_H
#define FA_KERNEL_STATE_H

#include "item.h"
#include "softmax.h"

/* The part of a block that the tile reads; its ends rounded out to whole operands and panel rows. */
FA_INLINE key_range tile_range(const tile *t, fa_interval keys)
{
    const bool in_panel_rows = is_decode(t) && !DECODES_IN_TILES;
    const int64_t mask = in_panel_rows ? ((int64_t)1 << t->key_shift) - 1 : TILE_K - 1;
    key_range range;
    range.key_lo = max_i64(keys.lo, t->key_lo);
    range.key_hi = min_i64(keys.hi, t->key_hi);
    range.first = range.key_lo & ~mask;
    range.last = (range.key_hi + mask) & ~mask;
    return range;
}

/* Rows as operands, in place. */
FA_INLINE operand_block in_place(const source_rows *src, int64_t begin, ptrdiff_t step)
{
    return (operand_block){src->data,         begin,      src->array->row, step,
                           src->array->dtype, src->scale, src->scale_step};
}

/* Rows [begin, end) that a product reads along their columns, as it does keys: in place, or packed at
 * `packed`, and before that gathered at `gathered` if they are scattered. */
static operand_block load_row_block(source_rows src, int64_t columns, int64_t begin, int64_t end,
                                    char *gathered, char *packed)
{
    const bool is_whole = begin % KEY_STEP == 0 && end % KEY_STEP == 0;
    fa_array dense;
    if (is_whole && key_is_operand(src.array, columns))
        return in_place(&src, begin, operand_step(src.array));
    if (is_scattered(src.array))
        src = gather_rows(&src, (int)(end - begin), (int)columns, &dense, gathered);
    const int lead = (int)(begin % KEY_STEP);
    pack_key(&src, lead, (int)(end - begin), (int)columns, packed);
    return (operand_block){.data = packed,
                           .first = begin - lead,
                           .row = packed_key_row(columns),
                           .col = packed_key_step(),
                           .dtype = FA_REAL_DTYPE};
}

/* The same, of rows that a product reads across, column by column, as it does values. */
static operand_block load_column_block(source_rows src, int64_t columns, int64_t begin, int64_t end,
                                       char *gathered, char *packed)
{
    fa_array dense;
    if (value_is_operand(src.array))
        return in_place(&src, begin, operand_step(src.array));
    if (is_scattered(src.array))
        src = gather_rows(&src, (int)(end - begin), (int)columns, &dense, gathered);
    const int lead = (int)(begin % VALUE_STEP);
    pack_value(&src, lead, (int)(end - begin), (int)columns, packed);
    return (operand_block){.data = packed,
                           .first = (begin - lead) / TILE_K,
                           .row = packed_value_bytes(columns),
                           .col = PACKED_VALUE_COL,
                           .dtype = FA_REAL_DTYPE};
}

/* The same, for a decode tile: of keys and values alike. */
static operand_block load_decode_block(source_rows src, int64_t columns, int64_t begin, int64_t end,
                                       char *gathered, char *packed)
{
    fa_array dense;
    if (is_vector_aligned(src.array, columns))
        return in_place(&src, begin, operand_step(src.array));
    if (is_scattered(src.array))
        src = gather_rows(&src, (int)(end - begin), (int)columns, &dense, gathered);
    pack_decode_rows(&src, (int)(end - begin), (int)columns, packed);
    return (operand_block){.data = packed,
                           .first = begin,
                           .row = packed_decode_row_bytes(columns),
                           .dtype = PRODUCTS_IN_BFLOAT16 ? FA_BFLOAT16 : FA_REAL_DTYPE};
}

/* Keys [begin, end), and their values, as operands. */
static operand_block load_key_block(const fa_problem *p, const item_arrays *a, int64_t begin, int64_t end,
                                    bool decode, const workspace *w, char *packed)
{
    const source_rows src = rows_from(p, a, &p->key, a->key, &p->key_scale, a->key_scale, begin);
    return decode ? load_decode_block(src, p->head_dim, begin, end, w->gathered, packed)
                  : load_row_block(src, p->head_dim, begin, end, w->gathered, packed);
}

static operand_block load_value_block(const fa_problem *p, const item_arrays *a, int64_t begin, int64_t end,
                                      bool decode, const workspace *w, char *packed)
{
    const source_rows src = rows_from(p, a, &p->value, a->value, &p->value_scale, a->value_scale, begin);
    return decode ? load_decode_block(src, p->head_dim_v, begin, end, w->gathered, packed)
                  : load_column_block(src, p->head_dim_v, begin, end, w->gathered, packed);
}

typedef struct {
    const fa_problem *problem;
    const fa_work_item *item, *next;
    item_arrays arrays, next_arrays;
    workspace w;
    int num_tiles;
    int block_keys;         /* in one piece, whose scores are computed at once */
    int64_t key_lo, key_hi; /* keys of the item's splits that some tile reads */
    fa_stop *stop;
} item_state; /* at the front of the scratch */

/* Of a tile of a few rows: the power of two that holds them, and the keys that share a vector then. */
static void set_decode_rows(int64_t rows, tile *t)
{
    t->rows_pow2 = 0;
    t->key_shift = 0;
    if (rows > DECODE_ROWS)
        return;
    for (t->rows_pow2 = 1; t->rows_pow2 < rows;)
        t->rows_pow2 *= 2;
    while (t->rows_pow2 << t->key_shift < LANES)
        t->key_shift++;
}

/* Spreads rows [row_begin, row_end), of a head group of `group_rows`, evenly over as few tiles as hold them.
 */
static void locate_tiles(item_state *s, int64_t row_begin, int64_t row_end, int64_t group_rows)
{
    const int vectors = (int)((row_end - row_begin + LANES - 1) / LANES);
    s->num_tiles = (vectors + MAX_VECTORS - 1) / MAX_VECTORS;
    s->key_lo = INT64_MAX;
    s->key_hi = 0;
    int64_t row = row_begin;
    for (int i = 0; i < s->num_tiles; i++) {
        tile *t = &s->w.tiles[i];
        set_decode_rows(group_rows, t);
        t->vectors = vectors / s->num_tiles + (i < vectors % s->num_tiles);
        if (t->vectors < MIN_VECTORS && !is_decode(t))
            t->vectors = MIN_VECTORS;
        t->rows = (int)min_i64(t->vectors * LANES, row_end - row);
        locate_rows(s->problem, &s->arrays, row, t);
        s->key_lo = min_i64(s->key_lo, t->key_lo);
        s->key_hi = max_i64(s->key_hi, t->key_hi);
        row += t->rows;
    }
}

/* Whether some row of a tile may see keys of [lo, hi). A mask that hides whole blocks from tiles belongs
 * here: next_block asks for every way of attending, and for what is packed and prefetched. */
FA_INLINE bool tile_sees(const tile *t, fa_interval keys)
{
    return t->key_lo < keys.hi && keys.lo < t->key_hi;
}

/* Blocks of `keys` keys begin at multiples of that, so that a row's sums are grouped the same way whatever
 * else its tile and its item see. */
FA_INLINE fa_interval block_at(int64_t begin, int keys, int64_t key_hi)
{
    return (fa_interval){begin, min_i64((begin / keys + 1) * keys, key_hi)};
}

/* The first block of [begin, key_hi) that some tile of the item sees; false if there is none. */
static bool next_block(const item_state *s, int64_t begin, int keys, int64_t key_hi, fa_interval *block)
{
    for (; begin < key_hi; begin = block->hi) {
        *block = block_at(begin, keys, key_hi);
        for (int i = 0; i < s->num_tiles; i++)
            if (tile_sees(&s->w.tiles[i], *block))
                return true;
    }
    return false;
}

/* That the item reads, by position. */
FA_INLINE int64_t first_key(const fa_work_item *item)
{
    return max_i64(item->sequence.key_lo, item->split_begin * item->split_keys);
}

/* The next block from `begin` on, and its arrays; after the last, the next item's first one. NULL: none. */
static const item_arrays *find_next_block(const item_state *s, int64_t begin, fa_interval *block)
{
    if (next_block(s, begin, s->block_keys, s->key_hi, block))
        return &s->arrays;
    if (!s->next)
        return NULL;
    *block = block_at(first_key(s->next), s->block_keys, s->next->sequence.key_hi);
    return block->lo < block->hi ? &s->next_arrays : NULL;
}

/* The keys of that block, and their values. */
static void stream_next_keys(const item_state *s, int64_t begin, row_stream *key, row_stream *value)
{
    const fa_problem *p = s->problem;
    fa_interval block;
    const item_arrays *a = find_next_block(s, begin, &block);
    key->count = value->count = 0;
    if (!a)
        return;
    const int rows = (int)(block.hi - block.lo);
    stream_rows(key, a->key + key_offset(p, a, &p->key, block.lo), &p->key, p->head_dim, rows);
    stream_rows(value, a->value + key_offset(p, a, &p->value, block.lo), &p->value, p->head_dim_v, rows);
}

static void stream_next_scales(const item_state *s, int64_t begin, row_stream *key, row_stream *value)
{
    const fa_problem *p = s->problem;
    fa_interval block;
    const item_arrays *a = find_next_block(s, begin, &block);
    if (!a)
        return;
    const int rows = (int)(block.hi - block.lo);
    set_stream(key, a->key_scale + key_offset(p, a, &p->key_scale, block.lo), p->key_scale.row, sizeof(float),
               rows);
    set_stream(value, a->value_scale + key_offset(p, a, &p->value_scale, block.lo), p->value_scale.row,
               sizeof(float), rows);
}

/* The queries of tile i, which are packed when it meets its first block; after the last tile, the next
 * item's first ones. */
static void stream_next_queries(const item_state *s, int i, next_streams *next)
{
    const fa_problem *p = s->problem;
    const bool in_item = i < s->num_tiles;
    if (!in_item && !s->next)
        return;
    const item_arrays *a = in_item ? &s->arrays : &s->next_arrays;
    const int64_t begin = in_item ? s->w.tiles[i].row_begin : s->next->row_begin;
    const int rows =
        in_item ? s->w.tiles[i].rows : (int)min_i64(s->next->row_end - s->next->row_begin, TILE_ROWS);
    stream_group_rows(&next->query, a->query + a->first_head * p->query.head, &p->query, p->head_dim, begin,
                      rows, a->group_size);
}

/* Makes room in the running softmax for scores up to `largest`. */
FA_INLINE void rescale_accumulators(const fa_problem *p, tile *t, vec block_max[MAX_VECTORS], real to_log2,
                                    int vectors, bool decode)
{
    vec rescale[MAX_VECTORS];
    if (!update_row_max(t, block_max, to_log2, vectors, decode, rescale))
        return;
    for (int m = 0; m < vectors; m++)
        t->row_sum[m] *= rescale[m];
    if (!t->empty)
        rescale_out(t, p->head_dim_v, vectors, rescale, t->out);
}

#endif

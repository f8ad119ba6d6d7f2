/* Attention of a decode tile: scores of some key blocks at once, so that the softmax waits for its few scores
 * less often.
 *
 * Requires state.h; provides attend_decode. */
#include "for_editors.h"

#ifndef FA_KERNEL_ATTEND_DECODE_H
#define FA_KERNEL_ATTEND_DECODE_H

#include "state.h"
#include "top.h"

/* What a decode tile takes between two updates of its softmax. */
typedef struct {
    key_range keys, blocks[DECODE_BLOCKS];
    bool seen[DECODE_BLOCKS]; /* by some row */
    int num_blocks;
    row_stream streams[2 * DECODE_BLOCKS + 2]; /* what is read, in this order: the keys of all blocks, their
                                                * values, and the keys and the values of the block behind */
} decode_step;

/* The part of the score panel that is a block's. */
FA_INLINE vec *block_panel(const item_state *s, const decode_step *step, int i)
{
    return s->w.scores + ((step->blocks[i].first - step->keys.first) >> s->w.tiles[0].key_shift);
}

/* Keys from `begin` on, and their values, as a decode tile reads them. */
static void list_block(const item_state *s, int64_t begin, row_stream *key, row_stream *value)
{
    next_streams block;
    clear_streams(&block);
    stream_next_keys(s, begin, &block);
    *key = block.key;
    *value = block.value;
}

/* Cuts the step's keys into blocks. */
static void list_blocks(const item_state *s, decode_step *step)
{
    const key_range *keys = &step->keys;
    int count = 0;
    for (int64_t begin = keys->key_lo, end; begin < keys->key_hi; begin = end) {
        end = block_end(begin, s->block_keys, keys->key_hi);
        step->blocks[count++] = tile_range(&s->w.tiles[0], begin, end);
    }
    for (int i = 0; i < count; i++)
        list_block(s, step->blocks[i].key_lo, step->streams + i, step->streams + count + i);
    list_block(s, keys->key_hi, step->streams + 2 * count, step->streams + 2 * count + 1);
    step->num_blocks = count;
}

/* Fills the panel with the scores of all blocks; false if no row sees any key. */
static bool compute_decode_scores(item_state *s, decode_step *step, vec block_max[1])
{
    const fa_problem *p = s->problem;
    tile *t = &s->w.tiles[0];
    bool any = false;
    block_max[0] = vec_splat(-(real)INFINITY);
    for (int i = 0; i < step->num_blocks; i++) {
        const key_range *range = &step->blocks[i];
        vec *panel = block_panel(s, step, i), block_max_[MAX_VECTORS];
        next_streams next;
        clear_streams(&next);
        next.streams = step->streams + i;
        if (s->arrays.key_scale)
            stream_next_keys(s, range->key_hi, &next);
        if (range->key_hi == s->key_hi)
            stream_next_queries(s, 1, &next);
        operand_block key =
            load_key_block(p, &s->arrays, range->key_lo, range->key_hi, true, &s->w, s->w.packed_key);
        step->seen[i] = compute_scores(p, t, range, &key, &next, 1, true, panel, block_max_);
        any |= step->seen[i];
        if (!step->seen[i]) {
            for (int r = 0; r < panel_rows(t, range, true); r++)
                panel[r] = vec_splat(-(real)INFINITY);
            continue;
        }
        if (p->top_count > 0)
            update_top(p, t, range, panel, 1, true);
        block_max[0] = vec_max(block_max_[0], block_max[0]);
    }
    return any;
}

/* Adds keys [begin, end), DECODE_KEYS at most, to the running softmax of an item's only tile, which is
 * a decode tile. */
static void attend_decode_keys(item_state *s, int64_t begin, int64_t end, bool nan_safe)
{
    const fa_problem *p = s->problem;
    tile *t = &s->w.tiles[0];
    decode_step step; /* filled as far as it is read: to clear it would take a hundredth of a small call */
    step.keys = tile_range(t, begin, end);
    vec block_max[MAX_VECTORS];
    if (step.keys.key_lo >= step.keys.key_hi)
        return;
    if (!t->packed)
        pack_tile(p, t);
    list_blocks(s, &step);
    if (!compute_decode_scores(s, &step, block_max))
        return;
    const real to_log2 = (real)(deferred_scale(p) * LOG2E);
    rescale_accumulators(p, t, block_max, to_log2, 1, true);
    exponentiate(t, s->w.scores, panel_rows(t, &step.keys, true), to_log2, 1, nan_safe);
    for (int i = 0; i < step.num_blocks; i++) {
        const key_range *range = &step.blocks[i];
        if (!step.seen[i])
            continue;
        operand_block value =
            load_value_block(p, &s->arrays, range->key_lo, range->key_hi, true, &s->w, s->w.packed_value);
        multiply_decode_value(p, t, range, &value, block_panel(s, &step, i),
                              step.streams + step.num_blocks + i, nan_safe);
        t->empty = false;
    }
}

/* The item's only tile over the keys [key_lo, key_hi), added to its running softmax. */
static void attend_decode(item_state *s, int64_t key_lo, int64_t key_hi, bool nan_safe)
{
    tile *t = &s->w.tiles[0];
    for (int64_t begin = key_lo, end; begin < key_hi; begin = end) {
        if (fa_should_stop(s->stop))
            return;
        begin_products();
        end = block_end(begin, DECODE_KEYS, key_hi);
        attend_decode_keys(s, begin, end, nan_safe);
    }
    gather_row_sum(t);
    memcpy(t->exact_sum, t->row_sum, sizeof t->exact_sum);
}

#endif

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
    key_range blocks[DECODE_BLOCKS];
    vec *panels[DECODE_BLOCKS]; /* their scores, without gaps */
    bool seen[DECODE_BLOCKS];   /* by some row */
    int num_blocks, panel_rows;
    row_stream streams[2 * DECODE_BLOCKS + 2]; /* what is read, in this order: the keys of all blocks, their
                                                * values, and the keys and the values of the block behind */
} decode_step;

/* Cuts the step's keys into blocks. */
static void list_blocks(const item_state *s, fa_interval keys, decode_step *step)
{
    const tile *t = &s->w.tiles[0];
    int count = 0;
    fa_interval block;
    step->panel_rows = 0;
    for (int64_t begin = keys.lo; next_block(s, begin, s->block_keys, keys.hi, &block); begin = block.hi) {
        step->blocks[count] = tile_range(t, block);
        step->panels[count] = s->w.scores + step->panel_rows;
        step->panel_rows += panel_rows(t, &step->blocks[count++], true);
    }
    for (int i = 0; i < count; i++)
        stream_next_keys(s, step->blocks[i].key_lo, step->streams + i, step->streams + count + i);
    stream_next_keys(s, keys.hi, step->streams + 2 * count, step->streams + 2 * count + 1);
    step->num_blocks = count;
}

/* Fills the panel with a block's scores, and finds each lane's largest; false if no row sees any of the keys,
 * and the panel is left as it was. */
FA_INLINE bool compute_decode_block(const fa_problem *p, tile *t, const key_range *range,
                                    const operand_block *key, const next_streams *next, vec *scores,
                                    vec block_max[MAX_VECTORS])
{
    score_mods mods;
    if (!sees_block(p, t, range, &mods))
        return false;
    const real scale = scales_in_epilogue(p) ? (real)scale_magnitude(p) : 1;
    multiply_decode_query_key(p, t, range, key, next, scale, scores);
    if (mods != 0)
        modify_scores(p, t, range, mods, scores, block_max);
    else
        find_block_max(scores, panel_rows(t, range, true), 1, block_max);
    return true;
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
        vec *panel = step->panels[i], block_max_[MAX_VECTORS];
        next_streams next;
        clear_streams(&next);
        next.streams = step->streams + i;
        if (s->arrays.key_scale)
            stream_next_scales(s, range->key_hi, &next.key_scale, &next.value_scale);
        if (range->key_hi == s->key_hi)
            stream_next_queries(s, 1, &next);
        operand_block key =
            load_key_block(p, &s->arrays, range->key_lo, range->key_hi, true, &s->w, s->w.packed_key);
        step->seen[i] = compute_decode_block(p, t, range, &key, &next, panel, block_max_);
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

/* Adds keys, DECODE_KEYS at most, to the running softmax of an item's only tile, which is a decode tile. */
static void attend_decode_keys(item_state *s, fa_interval keys, bool nan_safe)
{
    const fa_problem *p = s->problem;
    tile *t = &s->w.tiles[0];
    decode_step step; /* filled as far as it is read: to clear it would take a hundredth of a small call */
    vec block_max[MAX_VECTORS];
    if (!t->packed)
        pack_tile(p, t);
    list_blocks(s, keys, &step);
    if (!compute_decode_scores(s, &step, block_max))
        return;
    const real to_log2 = (real)(deferred_scale(p) * LOG2E);
    rescale_accumulators(p, t, block_max, to_log2, 1, true);
    exponentiate(t, s->w.scores, step.panel_rows, to_log2, 1, nan_safe);
    for (int i = 0; i < step.num_blocks; i++) {
        const key_range *range = &step.blocks[i];
        if (!step.seen[i])
            continue;
        operand_block value =
            load_value_block(p, &s->arrays, range->key_lo, range->key_hi, true, &s->w, s->w.packed_value);
        multiply_decode_value(p, t, range, &value, step.panels[i], step.streams + step.num_blocks + i,
                              nan_safe);
        t->empty = false;
    }
}

/* The item's only tile over the keys [key_lo, key_hi), added to its running softmax. */
static void attend_decode(item_state *s, int64_t key_lo, int64_t key_hi, bool nan_safe)
{
    tile *t = &s->w.tiles[0];
    fa_interval keys;
    for (int64_t begin = key_lo; next_block(s, begin, DECODE_KEYS, key_hi, &keys); begin = keys.hi) {
        if (fa_should_stop(s->stop))
            return;
        begin_products();
        attend_decode_keys(s, keys, nan_safe);
    }
    gather_row_sum(t);
    memcpy(t->exact_sum, t->row_sum, sizeof t->exact_sum);
}

#endif

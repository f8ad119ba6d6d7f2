/* Attention of wide tiles by multiply-adds: a block of keys after the other, and each as every tile sees it,
 * with both products, the softmax between them and the packing as phases of a block and tile.
 *
 * Requires state.h and a product; provides attend_wide. */
#include "for_editors.h"

#ifndef FA_KERNEL_ATTEND_WIDE_H
#define FA_KERNEL_ATTEND_WIDE_H

#include "state.h"
#include "top.h"
#include "wide.h"

/* Fills the panel, and finds each lane's largest score; false if no row sees any of the keys, and the panel
 * is left as it was. */
FA_INLINE bool compute_scores(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                              const next_streams *next, int vectors, vec *scores, vec block_max[MAX_VECTORS])
{
    score_mods mods;
    if (!sees_block(p, t, range, &mods))
        return false;
    const real scale = scales_in_epilogue(p) ? (real)scale_magnitude(p) : 1;
    multiply_query_key(p, t, range, key, next, scale, vectors, scores, block_max);
    mask_rows_behind(t, range, scores);
    if (mods != 0)
        modify_scores(p, t, range, mods, scores, block_max);
    return true;
}

/* Adds a key block to the running softmax of a wide tile. */
FA_INLINE void attend_block(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                            const operand_block *value, const next_streams *next, int vectors, bool nan_safe,
                            vec *scores)
{
    vec block_max[MAX_VECTORS];
    if (!compute_scores(p, t, range, key, next, vectors, scores, block_max))
        return;
    if (p->top_count > 0)
        update_top(p, t, range, scores, vectors, false);
    const real to_log2 = (real)(deferred_scale(p) * LOG2E);
    rescale_accumulators(p, t, block_max, to_log2, vectors, false);
    if (nan_safe)
        exponentiate(t, scores, num_keys(range), to_log2, vectors, true);
    else
        exponentiate(t, scores, num_keys(range), to_log2, vectors, false);
    if (has_dropout(p))
        drop_probabilities(p, t, range->first, num_keys(range), false, scores);
    const packed_vec *probabilities = pack_probabilities(scores, num_keys(range), vectors);
    multiply_value(p, t, range, value, probabilities, next, vectors, nan_safe);
    t->empty = false;
}

/* Key blocks of different tile widths: one inlined copy for each, chosen per tile and block. */
static void attend_block_any(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                             const operand_block *value, const next_streams *next, bool nan_safe, vec *scores)
{
    WITH_VECTORS(t->vectors, attend_block(p, t, range, key, value, next, VECTORS, nan_safe, scores));
}

/* The tile's results. */
static void stream_out(const item_state *s, const tile *t, next_streams *next)
{
    const fa_problem *p = s->problem;
    const item_arrays *a = &s->arrays;
    stream_group_rows(&next->out, a->out + a->first_head * p->out.head, &p->out, p->head_dim_v, t->row_begin,
                      t->rows, a->group_size);
    next->out.is_written = true;
}

/* A block of keys as every tile of the item sees it. */
static void attend_tiles(item_state *s, fa_interval block, bool nan_safe)
{
    const fa_problem *p = s->problem;
    operand_block key = load_key_block(p, &s->arrays, block.lo, block.hi, false, &s->w, s->w.packed_key);
    operand_block value =
        load_value_block(p, &s->arrays, block.lo, block.hi, false, &s->w, s->w.packed_value);
    const bool last_block = block.hi == s->key_hi;
    bool keys_prefetched = false; /* by one of the tiles */
    for (int i = 0; i < s->num_tiles; i++) {
        tile *t = &s->w.tiles[i];
        if (!tile_sees(t, block))
            continue;
        const key_range range = tile_range(t, block);
        next_streams next;
        clear_streams(&next);
        if (last_block)
            stream_out(s, t, &next);
        if (!keys_prefetched)
            stream_next_keys(s, block.hi, &next.key, &next.value);
        if (!t->packed ? i + 1 < s->num_tiles || last_block : last_block && i + 1 == s->num_tiles)
            stream_next_queries(s, i + 1, &next);
        if (!t->packed)
            pack_tile(p, t);
        attend_block_any(p, t, &range, &key, &value, &next, nan_safe, s->w.scores);
        keys_prefetched = true;
    }
}

/* The scores of a block and the panel's range; false if no row sees any of its keys. */
static bool compute_wide_scores(item_state *s, tile *t, const operand_block *key, fa_interval block,
                                key_range *range, vec *scores)
{
    static const next_streams nothing;
    const fa_problem *p = s->problem;
    vec block_max[MAX_VECTORS];
    *range = tile_range(t, block);
    bool any = false;
    WITH_VECTORS(t->vectors, any = compute_scores(p, t, range, key, &nothing, VECTORS, scores, block_max));
    return any;
}

/* Every wide tile over the keys [key_lo, key_hi), added to its running softmax. */
static void attend_wide(item_state *s, int64_t key_lo, int64_t key_hi, bool nan_safe)
{
    fa_interval block;
    for (int64_t begin = key_lo; next_block(s, begin, KEY_BLOCK, key_hi, &block); begin = block.hi) {
        if (fa_should_stop(s->stop))
            return;
        begin_products();
        attend_tiles(s, block, nan_safe);
    }
    for (int i = 0; i < s->num_tiles; i++)
        memcpy(s->w.tiles[i].exact_sum, s->w.tiles[i].row_sum, sizeof s->w.tiles[i].exact_sum);
}

#endif

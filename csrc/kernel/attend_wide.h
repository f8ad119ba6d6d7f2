/* Attention of wide tiles by multiply-adds: a block of keys after the other, and each as every tile sees it,
 * with both products, the softmax between them and the packing as phases of a block and tile.
 *
 * Requires state.h and a product; provides attend_wide. */
#include "for_editors.h"

#ifndef FA_KERNEL_ATTEND_WIDE_H
#define FA_KERNEL_ATTEND_WIDE_H

#include "state.h"
#include "top.h"

/* Adds a key block to the running softmax of a wide tile. */
FA_INLINE void attend_block(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                            const operand_block *value, const prefetch_plan *plan, int vectors, bool nan_safe,
                            vec *scores)
{
    vec block_max[MAX_VECTORS];
    if (!compute_scores(p, t, range, key, plan, vectors, false, scores, block_max))
        return;
    if (p->top_count > 0)
        update_top(p, t, range, scores, vectors, false);
    const real to_log2 = (real)(deferred_scale(p) * LOG2E);
    rescale_accumulators(p, t, block_max, to_log2, vectors, false);
    exponentiate(t, scores, num_keys(range), to_log2, vectors, nan_safe);
    const packed_vec *probabilities = pack_probabilities(scores, num_keys(range), vectors);
    multiply_value(p, t, range, value, probabilities, plan, vectors, nan_safe);
    t->empty = false;
}

/* Key blocks of different tile widths: one inlined copy for each, chosen per tile and block. */
static void attend_block_any(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                             const operand_block *value, const prefetch_plan *plan, bool nan_safe,
                             vec *scores)
{
    const int vectors = MIN_VECTORS == MAX_VECTORS ? MAX_VECTORS : t->vectors;
    if (nan_safe && vectors == 1)
        attend_block(p, t, range, key, value, plan, 1, true, scores);
    else if (nan_safe && vectors == 2)
        attend_block(p, t, range, key, value, plan, 2, true, scores);
    else if (nan_safe)
        attend_block(p, t, range, key, value, plan, MAX_VECTORS, true, scores);
    else if (vectors == 1)
        attend_block(p, t, range, key, value, plan, 1, false, scores);
    else if (vectors == 2)
        attend_block(p, t, range, key, value, plan, 2, false, scores);
    else
        attend_block(p, t, range, key, value, plan, MAX_VECTORS, false, scores);
}

/* Keys [begin, end), which lie in one block, as every tile of the item sees them. */
static void attend_tiles(item_state *s, int64_t begin, int64_t end, bool nan_safe)
{
    const fa_problem *p = s->problem;
    operand_block key = load_key_block(p, &s->arrays, begin, end, false, &s->w, s->w.packed_key);
    operand_block value = load_value_block(p, &s->arrays, begin, end, false, &s->w, s->w.packed_value);
    bool keys_prefetched = false; /* by one of the tiles */
    for (int i = 0; i < s->num_tiles; i++) {
        tile *t = &s->w.tiles[i];
        key_range range = tile_range(t, begin, end);
        bool last_block = end == s->key_hi;
        if (range.key_lo >= range.key_hi)
            continue;
        prefetch_plan plan = {0};
        if (last_block)
            plan.out_rows = t->rows;
        if (!keys_prefetched)
            plan_key_prefetch(s, end, &plan);
        if (!t->packed ? i + 1 < s->num_tiles || last_block : last_block && i + 1 == s->num_tiles)
            plan_query_prefetch(s, i + 1, &plan);
        if (!t->packed)
            pack_tile(p, t);
        attend_block_any(p, t, &range, &key, &value, &plan, nan_safe, s->w.scores);
        keys_prefetched = true;
    }
}

/* The scores of a block of keys [begin, end) and the panel's range; false if no row sees any of them. */
static bool compute_wide_scores(item_state *s, tile *t, const operand_block *key, int64_t begin, int64_t end,
                                key_range *range, vec *scores)
{
    static const row_stream none[STREAM_WINDOW];
    const prefetch_plan nothing = {.streams = none};
    const fa_problem *p = s->problem;
    vec block_max[MAX_VECTORS];
    *range = tile_range(t, begin, end);
    if (range->key_lo >= range->key_hi)
        return false;
    if (t->vectors == 1)
        return compute_scores(p, t, range, key, &nothing, 1, false, scores, block_max);
    if (t->vectors == 2)
        return compute_scores(p, t, range, key, &nothing, 2, false, scores, block_max);
    return compute_scores(p, t, range, key, &nothing, MAX_VECTORS, false, scores, block_max);
}

/* Every wide tile over the keys [key_lo, key_hi), added to its running softmax. */
static void attend_wide(item_state *s, int64_t key_lo, int64_t key_hi, bool nan_safe)
{
    for (int64_t begin = key_lo, end; begin < key_hi; begin = end) {
        if (fa_should_stop(s->stop))
            return;
        begin_products();
        end = block_end(begin, KEY_BLOCK, key_hi);
        attend_tiles(s, begin, end, nan_safe);
    }
    for (int i = 0; i < s->num_tiles; i++)
        memcpy(s->w.tiles[i].exact_sum, s->w.tiles[i].row_sum, sizeof s->w.tiles[i].exact_sum);
}

#endif

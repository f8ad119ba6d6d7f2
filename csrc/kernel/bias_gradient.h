/* The gradient of a bias: sums of dS over what the bias was broadcast to, lane by lane, for the keys of an
 * item. See csrc/bias_gradient.c.
 *
 * Requires backward.h; provides what a kernel's entry needs for it. */
#include "for_editors.h"

#ifndef FA_KERNEL_BIAS_GRADIENT_H
#define FA_KERNEL_BIAS_GRADIENT_H

#include "backward.h"

/* The sums are at the front of the scratch: [key][MAX_VECTORS], or one row for all keys. */
static int64_t bias_sum_rows(const fa_problem *p, int64_t keys)
{
    return p->gradients->grad_bias.col == 0 ? 1 : keys;
}

static size_t bias_sum_bytes(const fa_problem *p, int64_t keys)
{
    return ((size_t)bias_sum_rows(p, keys) * MAX_VECTORS * sizeof(vec) + 63) / 64 * 64;
}

static size_t bias_scratch_bytes(const fa_problem *p, int64_t keys)
{
    return bias_sum_bytes(p, keys) + backward_scratch_bytes(p, 0, 0, 0);
}

static void begin_bias_gradient(const fa_problem *p, const fa_bias_item *item, void *scratch)
{
    memset(scratch, 0, bias_sum_bytes(p, item->keys.hi - item->keys.lo));
}

FA_INLINE void add_bias_block(backward_state *b, tile *t, const grad_tile *g, fa_interval keys,
                              const grad_block *block, int64_t first_key, int vectors, bool nan_safe,
                              vec *sums)
{
    const key_range range = tile_range(t, keys);
    if (!compute_score_gradients(b, t, g, &range, block, vectors, nan_safe))
        return;
    const bool one_row = b->s.problem->gradients->grad_bias.col == 0;
    for (int64_t n = range.key_lo; n < range.key_hi; n++)
        for (int m = 0; m < vectors; m++)
            sums[(one_row ? 0 : n - first_key) * MAX_VECTORS + m] +=
                b->grad_scores[(n - range.first) * vectors + m];
}

/* Adds what the rows of a head of a batch item contribute. */
static void add_bias_gradient(const fa_problem *p, const fa_bias_item *item, void *scratch, fa_stop *stop)
{
    const int64_t keys_of_item = item->keys.hi - item->keys.lo;
    backward_state *b = (backward_state *)((char *)scratch + bias_sum_bytes(p, keys_of_item));
    item_state *s = &b->s;
    begin_backward(p, &item->work, 0, stop, b);
    b->arrays.delta = NULL;   /* the other pass stores it */
    s->arrays.group_size = 1; /* rows are those of one query head */
    s->arrays.first_head = item->head;
    locate_tiles(s, item->work.row_begin, item->work.row_end, INT64_MAX);
    tile *t = &s->w.tiles[0];
    begin_grad_tile(p, &s->arrays, &b->arrays, 0, t, &b->tiles[0], b->query_rows, b->grad_out_rows);
    const int64_t key_hi = min_i64(s->key_hi, item->keys.hi);
    fa_interval keys;
    for (int64_t n = max_i64(s->key_lo, item->keys.lo); next_block(s, n, KEY_BLOCK, key_hi, &keys);
         n = keys.hi) {
        if (fa_should_stop(stop))
            break;
        begin_products();
        grad_block block;
        load_grad_block(b, keys, &block);
        const bool nan_safe = !b->tiles[0].is_finite || !block.is_finite;
        WITH_VECTORS(t->vectors, add_bias_block(b, t, &b->tiles[0], keys, &block, item->keys.lo, VECTORS,
                                                nan_safe, scratch))
    }
    end_products();
}

static real sum_of_lanes(const vec *sums)
{
    real sum = 0;
    for (int j = 0; j < TILE_ROWS; j++)
        sum += sums[j / LANES][j % LANES];
    return sum;
}

/* Stores the sums, those of lanes that share an element added up. */
static void store_bias_gradient(const fa_problem *p, const fa_bias_item *item, void *scratch)
{
    const fa_array *to = &p->gradients->grad_bias;
    const vec *sums = scratch;
    char *data = at_batch(to, p, &item->work) + item->head * to->head;
    const int64_t first = item->keys.lo;
    for (int64_t i = 0; i < bias_sum_rows(p, item->keys.hi - first); i++, sums += MAX_VECTORS) {
        char *element = data + (first + i) * to->col;
        if (to->row == 0)
            store_element(element, to->dtype, sum_of_lanes(sums));
        for (int64_t row = item->row_begin; to->row != 0 && row < item->row_end; row++) {
            const int64_t j = row - item->row_begin;
            store_element(element + row * to->row, to->dtype, sums[j / LANES][j % LANES]);
        }
    }
}

#endif

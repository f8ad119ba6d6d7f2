/* The gradients of one work item: all keys of a kv head, and some splits of the rows of its head group.
 *
 * For some tiles at a time, block by block of keys: scores and their probabilities anew, then
 *
 *     dP = V · dOᵀ,  dS = p (dP - delta),  dQ += Kᵀ · dS,   lanes are query rows;
 *     dV += p · dO,  dK += dS · Q,                          lanes are columns.
 *
 * Five products, each of the form that the forward pass has. dQ is a tile's own; dK and dV are sums of the
 * item, in scratch, formed apart for each split of the rows and then added in the order of the splits, so
 * that they depend on neither the threads nor the batch.
 *
 * Requires grad_tile.h; provides what a kernel's entry needs for the backward pass. */
#include "for_editors.h"

#ifndef FA_KERNEL_BACKWARD_H
#define FA_KERNEL_BACKWARD_H

#include "grad_tile.h"

typedef struct {
    item_state s; /* its workspace has the tiles, the score panel and the packed keys */
    grad_arrays arrays;
    grad_tile tiles[MAX_GRAD_TILES];
    packed_vec *query_rows, *grad_out_rows;     /* of all tiles, for dK and dV */
    vec *grad_scores;                           /* dP, then dS: a panel like the scores */
    vec *raw_scores;                            /* with a softcap: the scores before it */
    vec *kept;                                  /* with dropout: the probabilities that are left */
    char *probability_operands, *grad_operands; /* the panels, rounded, for dV and dK */
    char *packed_value_rows;
    int64_t first_block, num_blocks; /* of KEY_BLOCK keys, that the sequence reads */
    vec *sums, *total;               /* dK and dV over a split, and over the splits before */
} backward_state;

/* --- scratch ---------------------------------------------------------------------------------------- */

static size_t grad_tile_bytes(const fa_problem *p)
{
    return (size_t)(query_panel_rows(p->head_dim) + query_panel_rows(p->head_dim_v) + p->head_dim +
                    MAX_SPARE_ROWS) *
               MAX_VECTORS * sizeof(vec) +
           (row_panel_bytes(p->head_dim, MAX_GRAD_TILES) + row_panel_bytes(p->head_dim_v, MAX_GRAD_TILES)) /
               MAX_GRAD_TILES;
}

static int count_grad_tiles(const fa_problem *p)
{
    const size_t fit = GRAD_TILE_BYTES / grad_tile_bytes(p);
    return fit < 1 ? 1 : fit > MAX_GRAD_TILES ? MAX_GRAD_TILES : (int)fit;
}

/* Of a block of keys that are packed in columns. */
FA_INLINE size_t column_block_bytes(int64_t columns)
{
    return (size_t)(KEY_BLOCK / TILE_K * packed_value_bytes(columns));
}

/* Vectors of dK and dV of a block. */
static int64_t block_sum_vectors(const fa_problem *p)
{
    return sum_vectors(p->head_dim) + sum_vectors(p->head_dim_v);
}

static int64_t count_blocks(int64_t key_lo, int64_t key_hi)
{
    return key_lo < key_hi ? (key_hi + KEY_BLOCK - 1) / KEY_BLOCK - key_lo / KEY_BLOCK : 0;
}

static size_t sum_bytes(const fa_problem *p, int64_t key_lo, int64_t key_hi)
{
    return (size_t)(count_blocks(key_lo, key_hi) * block_sum_vectors(p)) * sizeof(vec);
}

/* Lays out the scratch of `num_sums` sums of `sum_bytes` at `base`; with NULL, only sizes it. */
static size_t lay_out_backward(const fa_problem *p, size_t sum_bytes, int num_sums, char *base,
                               backward_state *b)
{
    const size_t panel_bytes = (KEY_BLOCK + MAX_SPARE_ROWS) * MAX_VECTORS * sizeof(vec);
    const int num_tiles = count_grad_tiles(p);
    workspace *w = &b->s.w;
    size_t offset = 0;
    w->tiles = take(base, &offset, (size_t)num_tiles * sizeof(tile));
    for (int i = 0; i < num_tiles; i++) {
        grad_tile *g = &b->tiles[i];
        void *query = take(base, &offset, query_bytes(p));
        if (base)
            w->tiles[i].query = query;
        g->grad_out =
            take(base, &offset, (size_t)query_panel_rows(p->head_dim_v) * MAX_VECTORS * sizeof(vec));
        g->grad_query =
            take(base, &offset, (size_t)(p->head_dim + MAX_SPARE_ROWS) * MAX_VECTORS * sizeof(vec));
    }
    b->query_rows = take(base, &offset, row_panel_bytes(p->head_dim, num_tiles));
    b->grad_out_rows = take(base, &offset, row_panel_bytes(p->head_dim_v, num_tiles));
    w->scores = take(base, &offset, panel_bytes);
    b->grad_scores = take(base, &offset, panel_bytes);
    b->raw_scores = take(base, &offset, p->softcap != 0 ? panel_bytes : 0);
    b->kept = take(base, &offset, has_dropout(p) ? panel_bytes : 0);
    b->probability_operands = take(base, &offset, panel_operand_bytes());
    b->grad_operands = take(base, &offset, panel_operand_bytes());
    /* Behind columns, a product reads as many rows as it may write beyond its last one. */
    w->packed_value = take(base, &offset, column_block_bytes(p->head_dim));
    w->packed_key = take(base, &offset, row_block_bytes(p->head_dim));
    b->packed_value_rows = take(base, &offset, row_block_bytes(p->head_dim_v));
    w->gathered = take(base, &offset, gathered_bytes(p));
    b->sums = take(base, &offset, num_sums > 0 ? sum_bytes : 0);
    b->total = take(base, &offset, num_sums > 1 ? sum_bytes : 0);
    return offset;
}

#define BACKWARD_STATE_BYTES ((sizeof(backward_state) + 63) / 64 * 64)

static size_t backward_scratch_bytes(const fa_problem *p, int64_t key_lo, int64_t key_hi, int num_sums)
{
    backward_state unused;
    return BACKWARD_STATE_BYTES + lay_out_backward(p, sum_bytes(p, key_lo, key_hi), num_sums, NULL, &unused);
}

/* Rows that are worked on together. */
static int64_t backward_rows(const fa_problem *p)
{
    return (int64_t)count_grad_tiles(p) * TILE_ROWS;
}

/* --- a block of keys -------------------------------------------------------------------------------- */

/* Keys of a block as operands: in rows, for scores; in columns, for dQ; and their values in rows, for dP. */
typedef struct {
    operand_block key, key_columns, value;
    source_rows source;
    bool is_finite;
} grad_block;

static bool are_finite_rows(const source_rows *src, int rows, int64_t columns)
{
    vec zeros = {0};
    for (int n = 0; n < rows; n++)
        zeros += zeros_of_row(src->data + n * src->array->row, src->array->col, src->array->dtype, columns);
    return are_finite(zeros);
}

static void load_grad_block(backward_state *b, fa_interval keys, grad_block *block)
{
    const item_state *s = &b->s;
    const fa_problem *p = s->problem;
    const item_arrays *a = &s->arrays;
    const int count = (int)(keys.hi - keys.lo);
    const source_rows key = rows_from(p, a, &p->key, a->key, NULL, NULL, keys.lo);
    const source_rows value = rows_from(p, a, &p->value, a->value, NULL, NULL, keys.lo);
    block->key = load_row_block(key, p->head_dim, keys.lo, keys.hi, s->w.gathered, s->w.packed_key);
    block->key_columns =
        TILE_K == 1 ? block->key
                    : load_column_block(key, p->head_dim, keys.lo, keys.hi, s->w.gathered, s->w.packed_value);
    block->value =
        load_row_block(value, p->head_dim_v, keys.lo, keys.hi, s->w.gathered, b->packed_value_rows);
    block->source = key;
    block->is_finite =
        are_finite_rows(&key, count, p->head_dim) && are_finite_rows(&value, count, p->head_dim_v);
    if (TILE_K > 1 && !block->is_finite)
        clear_not_finite(s->w.packed_value, column_block_bytes(p->head_dim));
}

/* Where the sums of a block of keys are. */
FA_INLINE vec *sums_of_block(const backward_state *b, int64_t key)
{
    return b->sums + (key / KEY_BLOCK - b->first_block) * block_sum_vectors(b->s.problem);
}

/* --- a tile and a block ----------------------------------------------------------------------------- */

/* Scores of the panel, with all that modifies them; false if no row sees any of the keys. */
FA_INLINE bool compute_modified_scores(backward_state *b, tile *t, const key_range *range,
                                       const operand_block *key, int vectors)
{
    const fa_problem *p = b->s.problem;
    vec *scores = b->s.w.scores, block_max[MAX_VECTORS];
    score_mods mods;
    if (!sees_block(p, t, range, &mods))
        return false;
    const real scale = scales_in_epilogue(p) ? (real)scale_magnitude(p) : 1;
    multiply_rows(key, range, t->query, p->head_dim, scale, vectors, scores);
    if (mods & MOD_SOFTCAP)
        memcpy(b->raw_scores, scores, (size_t)(num_keys(range) * vectors) * sizeof(vec));
    mask_rows_behind(t, range, scores);
    if (mods != 0)
        modify_scores(p, t, range, mods, scores, block_max);
    return true;
}

/* Scores -> probabilities, by the rows' lse; exponentiate says why row after row. nan_safe: those of hidden
 * keys are -0. */
FA_INLINE void exponentiate_by_lse(const grad_tile *g, vec *scores, int rows, real to_log2, int vectors,
                                   bool nan_safe)
{
    vec lse[MAX_VECTORS], rest[MAX_VECTORS];
    backward_power next[MAX_VECTORS];
    for (int m = 0; m < vectors; m++) {
        lse[m] = g->lse[m];
        rest[m] = g->lse_rest[m];
        next[m] = backward_exponent((scores[m] - lse[m]) * to_log2 + rest[m]);
    }
    for (int r = 0; r < rows; r++) {
        vec *row = scores + r * vectors, *row_after = r + 1 < rows ? row + vectors : row;
        backward_power now[MAX_VECTORS];
#pragma GCC unroll 3
        for (int m = 0; m < vectors; m++) {
            now[m] = next[m];
            next[m] = backward_exponent((row_after[m] - lse[m]) * to_log2 + rest[m]);
        }
#pragma GCC unroll 3
        for (int m = 0; m < vectors; m++) {
            vec p = backward_exp2_of(now[m]);
            if (nan_safe)
                p = vec_select(vec_equal(row[m], vec_splat(-(real)INFINITY)), vec_splat((real)-0.0), p);
            row[m] = p;
        }
    }
}

/* Probabilities of the panel; false if no row sees any of the keys. */
FA_INLINE bool compute_probabilities(backward_state *b, tile *t, const grad_tile *g, const key_range *range,
                                     const operand_block *key, int vectors, bool nan_safe)
{
    const fa_problem *p = b->s.problem;
    vec *scores = b->s.w.scores;
    if (!compute_modified_scores(b, t, range, key, vectors))
        return false;
    const real to_log2 = (real)(deferred_scale(p) * LOG2E);
    if (nan_safe)
        exponentiate_by_lse(g, scores, num_keys(range), to_log2, vectors, true);
    else
        exponentiate_by_lse(g, scores, num_keys(range), to_log2, vectors, false);
    if (has_dropout(p))
        drop_probabilities(p, t, range->first, num_keys(range), true, scores);
    return true;
}

/* dP of the panel -> dS = p (dP - delta). Where p is 0 it is p: what is hidden may be NaN. */
FA_INLINE void differentiate_softmax(const grad_tile *g, const vec *probabilities, int rows, int vectors,
                                     vec *grad_scores)
{
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int m = 0; m < vectors; m++) {
            const vec p = probabilities[r * vectors + m];
            vec *x = &grad_scores[r * vectors + m];
            *x = vec_select(vec_equal(p, vec_splat(0)), p, p * (*x - g->delta[m]));
        }
}

/* Before that: where p has a sign it was dropped, and dP is 0, else it is multiplied as p is. The signs go,
 * and what is left of them, for dV, is the panel `kept`. */
static void differentiate_dropout(const fa_problem *p, vec *probabilities, int count, vec *grad_scores,
                                  vec *kept)
{
    for (int i = 0; i < count; i++) {
        const vec x = probabilities[i];
        const vmask is_dropped = vec_greater(vec_splat(0), x);
        kept[i] = without_dropped(x);
        probabilities[i] = vec_select(is_dropped, vec_abs(x), x);
        grad_scores[i] = vec_select(is_dropped, vec_splat(0), grad_scores[i] * kept_factor(p));
    }
}

/* dS of capped scores c tanh(s / c) -> dS of s; 1 - tanh² is their slope. */
static void differentiate_softcap(const fa_problem *p, const vec *raw_scores, int count, vec *grad_scores)
{
    score_mod_terms terms;
    set_softcap(p, &terms);
    for (int i = 0; i < count; i++) {
        const vec t = vec_tanh(raw_scores[i] * terms.inverse_softcap), slope = 1 - t * t;
        const vec x = grad_scores[i];
        grad_scores[i] = vec_select(vec_equal(x, vec_splat(0)), x, x * slope);
    }
}

/* Both panels: probabilities, and dS of the scores after all that modifies them; false if no row sees any of
 * the keys. */
FA_INLINE bool compute_score_gradients(backward_state *b, tile *t, const grad_tile *g, const key_range *range,
                                       const grad_block *block, int vectors, bool nan_safe)
{
    if (!compute_probabilities(b, t, g, range, &block->key, vectors, nan_safe))
        return false;
    multiply_rows(&block->value, range, g->grad_out, b->s.problem->head_dim_v, 1, vectors, b->grad_scores);
    if (has_dropout(b->s.problem))
        differentiate_dropout(b->s.problem, b->s.w.scores, num_keys(range) * vectors, b->grad_scores,
                              b->kept);
    differentiate_softmax(g, b->s.w.scores, num_keys(range), vectors, b->grad_scores);
    return true;
}

#if FUSES_SOFTMAX
/* With nothing between the softmax, its gradient and the rounding of both: one pass. */
FA_INLINE void differentiate_block_fused(backward_state *b, int i, const key_range *range,
                                         const grad_block *block, key_gradients *of_keys, int vectors)
{
    const fa_problem *p = b->s.problem;
    tile *t = &b->s.w.tiles[i];
    grad_tile *g = &b->tiles[i];
    if (!compute_modified_scores(b, t, range, &block->key, vectors))
        return;
    multiply_rows(&block->value, range, g->grad_out, p->head_dim_v, 1, vectors, b->grad_scores);
    const softmax_terms terms = {g->lse, g->lse_rest, g->delta, (real)(deferred_scale(p) * LOG2E)};
    add_fused_gradients(of_keys, i, range, &terms, &block->key_columns, b->s.w.scores, b->grad_scores,
                        g->empty, g->grad_query);
    g->empty = false;
}
#endif

FA_INLINE void differentiate_block(backward_state *b, int i, fa_interval keys, const grad_block *block,
                                   key_gradients *of_keys, int vectors, bool nan_safe)
{
    const fa_problem *p = b->s.problem;
    tile *t = &b->s.w.tiles[i];
    grad_tile *g = &b->tiles[i];
    const key_range range = tile_range(t, keys);
#if FUSES_SOFTMAX
    if (!nan_safe && !has_dropout(p) && p->softcap == 0) {
        differentiate_block_fused(b, i, &range, block, of_keys, vectors);
        return;
    }
#endif
    if (!compute_score_gradients(b, t, g, &range, block, vectors, nan_safe))
        return;
    if (p->softcap != 0)
        differentiate_softcap(p, b->raw_scores, num_keys(&range) * vectors, b->grad_scores);
    add_key_gradients(of_keys, i, t, g->grad_out_row, &range, has_dropout(p) ? b->kept : b->s.w.scores,
                      b->grad_scores, vectors, nan_safe);
    if (nan_safe)
        multiply_columns(&block->key_columns, &range, b->grad_scores, p->head_dim, vectors, true, g->empty,
                         g->grad_query);
    else
        multiply_columns(&block->key_columns, &range, b->grad_scores, p->head_dim, vectors, false, g->empty,
                         g->grad_query);
    g->empty = false;
    if (nan_safe)
        add_columns_not_finite(&block->source, keys, &range, b->grad_scores, p->head_dim, g->grad_query);
}

/* A block of keys and every tile that sees some of it. */
static void differentiate_tiles_of_block(backward_state *b, fa_interval keys)
{
    const item_state *s = &b->s;
    const fa_problem *p = s->problem;
    grad_block block;
    load_grad_block(b, keys, &block);
    vec *sums = sums_of_block(b, keys.lo);
    key_gradients of_keys = {.query = &p->query,
                             .grad_out = &p->gradients->grad_out,
                             .head_dim = p->head_dim,
                             .head_dim_v = p->head_dim_v,
                             .key_sums = sums,
                             .value_sums = sums + sum_vectors(p->head_dim),
                             .query_rows = b->query_rows,
                             .grad_out_rows = b->grad_out_rows,
                             .probability_operands = b->probability_operands,
                             .grad_operands = b->grad_operands};
    begin_key_gradients(&of_keys);
    for (int i = 0; i < s->num_tiles; i++) {
        if (!tile_sees(&s->w.tiles[i], keys))
            continue;
        /* Not a constant of the copies: they would be twice as many. */
        const bool nan_safe = !b->tiles[i].is_finite || !block.is_finite;
        WITH_VECTORS(s->w.tiles[i].vectors,
                     differentiate_block(b, i, keys, &block, &of_keys, VECTORS, nan_safe))
    }
    finish_key_gradients(&of_keys);
}

/* --- an item ---------------------------------------------------------------------------------------- */

/* Rows [row_begin, row_end), as many as the tiles hold. */
static void differentiate_tiles(backward_state *b, int64_t row_begin, int64_t row_end)
{
    item_state *s = &b->s;
    locate_tiles(s, row_begin, row_end, INT64_MAX);
    for (int i = 0; i < s->num_tiles; i++)
        begin_grad_tile(s->problem, &s->arrays, &b->arrays, i, &s->w.tiles[i], &b->tiles[i], b->query_rows,
                        b->grad_out_rows);
    fa_interval keys;
    for (int64_t begin = s->key_lo; next_block(s, begin, KEY_BLOCK, s->key_hi, &keys); begin = keys.hi) {
        if (fa_should_stop(s->stop))
            return;
        begin_products();
        differentiate_tiles_of_block(b, keys);
    }
    for (int i = 0; i < s->num_tiles; i++)
        finish_grad_tile(s->problem, &b->arrays, &s->w.tiles[i], &b->tiles[i]);
}

/* b->sums = dK and dV over the rows of a split. */
static void differentiate_split(backward_state *b, int64_t split)
{
    const fa_problem *p = b->s.problem;
    const fa_work_item *item = b->s.item;
    const int64_t end = min_i64((split + 1) * item->split_rows, item->row_end), step = backward_rows(p);
    memset(b->sums, 0, (size_t)(b->num_blocks * block_sum_vectors(p)) * sizeof(vec));
    for (int64_t row = split * item->split_rows; row < end && !fa_should_stop(b->s.stop); row += step)
        differentiate_tiles(b, row, min_i64(row + step, end));
}

static void add_to_total(const vec *sums, int64_t count, vec *total)
{
    for (int64_t i = 0; i < count; i++)
        total[i] += sums[i];
}

/* Key n's row of a gradient, times `scale`; 0 if no query sees it. */
static void store_key_gradient(const backward_state *b, const fa_array *to, char *data, const vec *sums,
                               int64_t n, int64_t columns, real scale)
{
    const int64_t block = n / KEY_BLOCK - b->first_block;
    const bool is_seen = block >= 0 && block < b->num_blocks;
    char *row = data + n * to->row;
    if (is_seen)
        sums += block * block_sum_vectors(b->s.problem);
    for (int i = 0; i < count_column_panels(columns); i++) {
        const column_panel panel = column_panel_at(columns, i);
        for (int v = 0; v < panel.vectors; v++) {
            const int e = (panel.vector + v) * LANES;
            const vec x = is_seen ? sums[(n % KEY_BLOCK) * panel.vectors + v] * scale : vec_splat(0);
            store_elements(row + e * to->col, to->col, (int)min_i64(LANES, columns - e), to->dtype, x);
        }
        if (is_seen)
            sums += SUM_ROWS * panel.vectors;
    }
}

/* Of every key of the sequence, also of those that key_lengths cuts off. */
static void store_key_gradients(const backward_state *b, const vec *sums)
{
    const fa_problem *p = b->s.problem;
    const fa_gradients *g = p->gradients;
    const int64_t num_keys = p->cu_seqlens_k ? b->s.item->sequence.num_keys : p->seqlen_k;
    for (int64_t n = 0; n < num_keys; n++) {
        store_key_gradient(b, &g->grad_key, b->arrays.grad_key, sums, n, p->head_dim, gradient_scale(p));
        store_key_gradient(b, &g->grad_value, b->arrays.grad_value, sums + sum_vectors(p->head_dim), n,
                           p->head_dim_v, kept_factor(p));
    }
}

/* Every split, added up as they come. */
static void differentiate_all_splits(backward_state *b)
{
    const fa_work_item *item = b->s.item;
    const int64_t count = b->num_blocks * block_sum_vectors(b->s.problem);
    for (int64_t split = item->split_begin; split < item->split_end; split++) {
        differentiate_split(b, split);
        if (split == item->split_begin && item->num_splits > 1)
            memcpy(b->total, b->sums, (size_t)count * sizeof(vec));
        else if (item->num_splits > 1)
            add_to_total(b->sums, count, b->total);
    }
    store_key_gradients(b, item->num_splits > 1 ? b->total : b->sums);
}

/* One split; the last of the group to be there adds all up, in their order. */
static void differentiate_shared_split(backward_state *b)
{
    const fa_work_item *item = b->s.item;
    const fa_sequence *sequence = &item->sequence;
    const size_t bytes = sum_bytes(b->s.problem, sequence->key_lo, sequence->key_hi);
    const int64_t count = b->num_blocks * block_sum_vectors(b->s.problem);
    b->sums = (vec *)(item->partials + (size_t)item->split_begin * bytes);
    differentiate_split(b, item->split_begin);
    if (atomic_fetch_add_explicit(item->splits_done, 1, memory_order_acq_rel) + 1 < item->num_splits)
        return;
    vec *total = (vec *)item->partials;
    for (int64_t split = 1; split < item->num_splits; split++)
        add_to_total((vec *)(item->partials + (size_t)split * bytes), count, total);
    store_key_gradients(b, total);
}

/* The state at the front of the scratch, of an item with so many sums. */
static void begin_backward(const fa_problem *p, const fa_work_item *item, int num_sums, fa_stop *stop,
                           backward_state *b)
{
    const fa_sequence *sequence = &item->sequence;
    b->s = (item_state){.problem = p, .item = item, .arrays = locate(p, item), .stop = stop};
    b->arrays = locate_gradients(p, item);
    b->first_block = sequence->key_lo / KEY_BLOCK;
    b->num_blocks = count_blocks(sequence->key_lo, sequence->key_hi);
    lay_out_backward(p, sum_bytes(p, sequence->key_lo, sequence->key_hi), num_sums,
                     (char *)b + BACKWARD_STATE_BYTES, b);
}

static void backward_item(const fa_problem *p, const fa_work_item *item, void *scratch, fa_stop *stop)
{
    backward_state *b = scratch;
    begin_backward(p, item, item->partials ? 0 : item->num_splits > 1 ? 2 : 1, stop, b);
    if (item->partials)
        differentiate_shared_split(b);
    else
        differentiate_all_splits(b);
    end_products();
}

#endif

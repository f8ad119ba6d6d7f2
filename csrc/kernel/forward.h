/* Forward attention of one work item. Included last by a kernel's source file, which defines
 * FA_KERNEL (the symbol), FA_ISA and FA_NAME (its labels).
 *
 * Requires an element type, an instruction set, an operand and a product; provides the kernel. */
#include "for_editors.h"

#ifndef FA_KERNEL_FORWARD_H
#define FA_KERNEL_FORWARD_H

#include "attend_decode.h"
#include "limits.h"
#include "partial.h"

#if IS_PIPELINED
#include "attend_pipeline.h"
#else
#include "attend_wide.h"
#endif

#if HAS_BACKWARD
#include "bias_gradient.h"
#endif

#define MERGES (!PRODUCTS_IN_BFLOAT16 && MAX_PARTS == 1)
#if MERGES
#include "merge.h"
#endif

/* Scores of the panel -> weights. */
FA_INLINE void normalise(const fa_problem *p, const tile *t, int rows, int vectors, vec *scores)
{
    const real to_log2 = (real)(deferred_scale(p) * LOG2E);
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    for (int m = 0; m < vectors; m++) {
        vec reference = finite_row_max(t, m);
        vec inverse_sum = inverse_or_zero(t->row_sum[m]);
        for (int r = 0; r < rows; r++) {
            vec s = scores[r * vectors + m];
            vec weight = vec_exp2((s - reference) * to_log2) * inverse_sum;
            /* 0 even in a row whose sum is NaN */
            scores[r * vectors + m] = vec_select(vec_equal(s, minus_infinity), vec_splat(0), weight);
        }
    }
}

static void drop_weights(const fa_problem *p, const tile *t, const key_range *range, vec *weights)
{
    drop_probabilities(p, t, range->first, num_keys(range), false, weights);
    for (int i = 0; i < num_keys(range) * t->vectors; i++)
        weights[i] *= kept_factor(p);
}

static void store_decode_weights(const fa_problem *p, const tile *t, const key_range *range, const vec *panel,
                                 char *const *rows)
{
    const real *weight = (const real *)panel;
    for (int64_t n = range->key_lo; n < range->key_hi; n++)
        for (int r = 0; r < t->rows; r++)
            store_element(rows[r] + n * p->weights.col, p->weights.dtype,
                          weight[(n - range->first) * t->rows_pow2 + r]);
}

static void store_weights(const fa_problem *p, const item_arrays *a, const tile *t, const key_range *range,
                          const vec *panel)
{
    char *rows[TILE_ROWS];
    for (int j = 0; j < t->rows; j++)
        rows[j] = a->weights + t->head[j] * p->weights.head + t->row[j] * p->weights.row;
    if (is_decode(t)) {
        store_decode_weights(p, t, range, panel, rows);
        return;
    }
    for (int m = 0; m < t->vectors; m++) {
        for (int64_t n = range->key_lo; n < range->key_hi; n += LANES) {
            int count = (int)min_i64(LANES, range->key_hi - n);
            vec x[LANES];
            for (int j = 0; j < LANES; j++)
                x[j] = panel[(min_i64(n + j, range->key_hi - 1) - range->first) * t->vectors + m];
            store_transposed(rows + m * LANES, rows_of_vector(t, m), n * p->weights.col, p->weights.col,
                             count, p->weights.dtype, x);
        }
    }
}

/* The weights of a key block, from the finished row_max and row_sum; false if no row sees any of the keys. */
static bool compute_weights(item_state *s, tile *t, const operand_block *key, fa_interval block,
                            key_range *range, vec *weights)
{
    static const row_stream none[STREAM_WINDOW];
    const next_streams nothing = {.streams = none};
    const bool decode = is_decode(t);
    vec block_max[MAX_VECTORS];
    *range = tile_range(t, block);
    if (decode ? !compute_decode_block(s->problem, t, range, key, &nothing, weights, block_max)
               : !compute_wide_scores(s, t, key, block, range, weights))
        return false;
    normalise(s->problem, t, panel_rows(t, range, decode), decode ? 1 : t->vectors, weights);
    if (has_dropout(s->problem))
        drop_weights(s->problem, t, range, weights);
    return true;
}

/* Every tile over every key block of [key_lo, key_hi), from an empty softmax on. */
static void attend_keys(item_state *s, int64_t key_lo, int64_t key_hi, bool with_sinks, bool nan_safe)
{
    for (int i = 0; i < s->num_tiles; i++) {
        reset_tile(s->problem, &s->arrays, with_sinks, &s->w.tiles[i]);
        reset_top(s->problem, &s->w.tiles[i]);
    }
    if (is_decode(&s->w.tiles[0]))
        attend_decode(s, key_lo, key_hi, nan_safe);
    else
        attend_wide(s, key_lo, key_hi, nan_safe);
}

/* False if some result may not be finite. */
static bool finish_tiles(item_state *s)
{
    bool finite = true;
    for (int i = 0; i < s->num_tiles; i++) {
        tile *t = &s->w.tiles[i];
        if (s->problem->adds)
            share_results(s->problem, &s->arrays, t);
        finite &= finish_tile(s->problem, t);
    }
    return finite;
}

static bool are_finite_outs(const item_state *s)
{
    bool finite = true;
    for (int i = 0; i < s->num_tiles; i++)
        finite &= is_finite_out(s->problem, &s->w.tiles[i]);
    return finite;
}

/* 0 · NaN is NaN: a value that is not finite, under a key that some rows see and others do not, has reached
 * all of them. That shows in the results, and only then are hidden values kept apart, in a second try. */
static void attend_whole(item_state *s)
{
    attend_keys(s, s->key_lo, s->key_hi, true, false);
    const bool tries = !s->problem->adds; /* what is added to what is there is so once */
    if (tries && (finish_tiles(s) || are_finite_outs(s)))
        return;
    if (tries || !are_finite_outs(s))
        attend_keys(s, s->key_lo, s->key_hi, true, true);
    finish_tiles(s);
}

/* The tiles' softmaxes over one split of the keys, and tried again as in attend_whole. */
static void attend_split(item_state *s, int64_t split)
{
    const int64_t key_lo = max_i64(s->key_lo, split * s->item->split_keys);
    const int64_t key_hi = min_i64(s->key_hi, (split + 1) * s->item->split_keys);
    const bool with_sinks = split == s->item->first_split;
    attend_keys(s, key_lo, key_hi, with_sinks, false);
    if (!are_finite_outs(s))
        attend_keys(s, key_lo, key_hi, with_sinks, true);
}

/* Adds a tile's softmax over a split to that over those before it. */
static void add_split(const fa_problem *p, tile *t, bool first, partial *split)
{
    if (t->empty && !first)
        return;
    fill_if_empty(p, t);
    save_partial(p, t, first ? t->total : split);
    if (!first)
        merge_partial(p, t, (real)(deferred_scale(p) * LOG2E), t->total, split);
}

/* Every split, merged as they come. */
static void attend_all_splits(item_state *s)
{
    const fa_problem *p = s->problem;
    for (int64_t split = s->item->split_begin; split < s->item->split_end; split++) {
        attend_split(s, split);
        for (int i = 0; i < s->num_tiles; i++)
            add_split(p, &s->w.tiles[i], split == s->item->split_begin, s->w.split);
    }
    for (int i = 0; i < s->num_tiles; i++)
        load_partial(p, s->w.tiles[i].total, &s->w.tiles[i]);
}

/* One split of a group's only tile, merged with the others if it is the last to be there. False if it is not.
 */
static bool attend_shared_split(item_state *s)
{
    const fa_problem *p = s->problem;
    const fa_work_item *item = s->item;
    tile *t = &s->w.tiles[0];
    const size_t bytes = partial_bytes(p, item->row_end - item->row_begin);
    attend_split(s, item->split_begin);
    fill_if_empty(p, t);
    save_partial(p, t, (partial *)(item->partials + (size_t)(item->split_begin - item->first_split) * bytes));
    if (atomic_fetch_add_explicit(item->splits_done, 1, memory_order_acq_rel) + 1 < item->num_splits)
        return false;
    partial *total = (partial *)item->partials;
    for (int64_t i = 1; i < item->num_splits; i++)
        merge_partial(p, t, (real)(deferred_scale(p) * LOG2E), total,
                      (partial *)(item->partials + (size_t)i * bytes));
    load_partial(p, total, t);
    return true;
}

/* A second pass: weights need the sums of all keys. */
static void attend_weights(item_state *s)
{
    const fa_problem *p = s->problem;
    fa_interval block;
    for (int64_t begin = s->key_lo; next_block(s, begin, KEY_BLOCK, s->key_hi, &block); begin = block.hi) {
        if (fa_should_stop(s->stop))
            return;
        begin_products();
        operand_block key = load_key_block(p, &s->arrays, block.lo, block.hi, is_decode(&s->w.tiles[0]),
                                           &s->w, s->w.packed_key);
        for (int i = 0; i < s->num_tiles; i++) {
            tile *t = &s->w.tiles[i];
            key_range range;
            if (!tile_sees(t, block) || !compute_weights(s, t, &key, block, &range, s->w.scores))
                continue;
            if (p->weights.data)
                store_weights(p, &s->arrays, t, &range, s->w.scores);
            if (p->column_sums.data)
                add_column_sums(p, &s->arrays, t, &range, s->w.scores);
        }
    }
}

/* What is masked or packed is so block by block, and a page may end with a block. */
static int decode_block_keys(const fa_problem *p)
{
    const bool in_one_page = !p->page_table.data || p->page_size % DECODE_KEYS == 0;
    const bool in_place =
        is_vector_aligned(&p->key, p->head_dim) && is_vector_aligned(&p->value, p->head_dim_v);
    const bool one_piece = in_place && in_one_page && !p->mask.data;
    return one_piece ? DECODE_KEYS : KEY_BLOCK;
}

/* The tiles of an item, and the keys that they and its splits have in common. */
static void locate_item(item_state *s, const fa_work_item *item)
{
    const int64_t group_rows = s->arrays.group_size * item->sequence.num_queries;
    const bool decode = fa_is_decode(s->problem, group_rows, DECODE_ROWS);
    locate_tiles(s, item->row_begin, item->row_end, decode ? group_rows : INT64_MAX);
    s->block_keys = is_decode(&s->w.tiles[0]) ? decode_block_keys(s->problem) : KEY_BLOCK;
    s->key_lo = max_i64(s->key_lo, item->split_begin * item->split_keys);
    s->key_hi = min_i64(s->key_hi, item->split_end * item->split_keys);
}

static void attend_item(item_state *s)
{
    const fa_problem *p = s->problem;
    if (s->item->num_splits == 1) {
        attend_whole(s);
    } else {
        if (!s->item->partials)
            attend_all_splits(s);
        else if (!attend_shared_split(s))
            return;
        finish_tiles(s);
    }
    if (p->lse.data && !p->adds)
        for (int i = 0; i < s->num_tiles; i++)
            store_lse(p, &s->arrays, &s->w.tiles[i]);
    if (p->top_count > 0)
        for (int i = 0; i < s->num_tiles; i++)
            store_top(p, &s->arrays, &s->w.tiles[i]);
    if (p->weights.data || p->column_sums.data)
        attend_weights(s);
}

#define STATE_BYTES ((sizeof(item_state) + 63) / 64 * 64)

static void forward_item(const fa_problem *p, const fa_work_item *item, const fa_work_item *next,
                         void *scratch, fa_stop *stop)
{
    item_state *s = scratch;
    const item_arrays arrays = item->same_geometry && s->next ? s->next_arrays : locate(p, item);
    s->problem = p;
    s->item = item;
    s->next = next;
    if (next)
        s->next_arrays = locate(p, next);
    s->stop = stop;
    if (item->same_geometry) {
        for (int i = 0; i < s->num_tiles; i++)
            move_tile(p, &s->arrays, &arrays, &s->w.tiles[i]);
        s->arrays = arrays;
    } else {
        int64_t rows = item->row_end - item->row_begin;
        s->arrays = arrays;
        lay_out(p, (int)((rows + TILE_ROWS - 1) / TILE_ROWS), (char *)scratch + STATE_BYTES, &s->w);
        locate_item(s, item);
    }
    attend_item(s);
    end_products();
}

static size_t scratch_bytes(const fa_problem *p, int tiles)
{
    workspace unused;
    return STATE_BYTES + lay_out(p, tiles, NULL, &unused);
}

#define READ_PREFETCH_BYTES 8192

static uint64_t read_bytes(const char *data, size_t bytes, bool prefetches)
{
    typedef uint64_t words __attribute__((vector_size(FA_VECTOR_BYTES)));
    typedef uint64_t words_unaligned __attribute__((vector_size(FA_VECTOR_BYTES), aligned(1), may_alias));
    words sums[8] = {{0}};
    size_t i = 0;
    for (; i + sizeof sums <= bytes; i += sizeof sums) {
#pragma GCC unroll 8
        for (size_t j = 0; j < 8; j++) {
            const char *at = data + i + j * FA_VECTOR_BYTES;
            if (prefetches)
                __builtin_prefetch(at + READ_PREFETCH_BYTES, 0, 2);
            sums[j] += *(const words_unaligned *)at;
        }
    }
    for (size_t j = 1; j < 8; j++)
        sums[0] += sums[j];
    uint64_t sum = 0;
    for (size_t j = 0; j < FA_VECTOR_BYTES / sizeof sum; j++)
        sum += sums[0][j];
    for (; i < bytes; i++)
        sum += (unsigned char)data[i];
    return sum;
}

const fa_kernel FA_KERNEL = {
    .isa = FA_ISA,
    .name = FA_NAME,
    .lanes = LANES,
    .max_vectors = MAX_VECTORS,
    .flushes_subnormals = FA_REAL_BYTES == 4,
    .max_tiles = MAX_TILES,
    .items_per_thread = ITEMS_PER_THREAD,
    .splits_many_rows = SPLITS_MANY_ROWS,
    .decode_rows = DECODE_ROWS,
    .decodes_int8 = DECODES_IN_TILES,
    .scratch_bytes = scratch_bytes,
    .partial_bytes = partial_bytes,
    .forward = forward_item,
    .softmax_beside_products = IS_PIPELINED,
#if HAS_BACKWARD
    .backward = backward_item,
    .backward_rows = backward_rows,
    .backward_scratch_bytes = backward_scratch_bytes,
    .sum_bytes = sum_bytes,
    .bias_scratch_bytes = bias_scratch_bytes,
    .begin_bias_gradient = begin_bias_gradient,
    .add_bias_gradient = add_bias_gradient,
    .store_bias_gradient = store_bias_gradient,
#endif
#if MERGES
    .mix_rows = mix_rows,
#endif
    .peak = measure_peak_rounds,
    .decode_peak = measure_decode_rounds,
    .softmax_peak = measure_softmax_rounds,
    .read = read_bytes,
};

#endif

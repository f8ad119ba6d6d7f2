/* Attention of wide tiles on the tile unit, as a pipeline. The unit of work is a tile of 32 query rows over a
 * block of 64 keys; unit u goes through three stages, of which those of three units run at a time:
 *
 *     tile unit:  P V of u - 1, then K Qᵀ of u + 1
 *     vectors:    softmax of u, in pieces between these products
 *
 * P V comes first and takes all of P into registers, and K Qᵀ stores scores behind the softmax: one panel of
 * scores and one of probabilities are enough. Values (and keys that need it) are packed once for all tiles of
 * the item, a superblock of keys at a time; then a tile goes over all blocks of it, so that its sums stay in
 * L1 (16 KiB for 64 columns with scores, probabilities and queries).
 *
 * There is no pass for the maximum: a row takes it from the first block it sees, and it is raised only where
 * a later one exceeds it by more than max_excess_log2. That shows in the block's sum, and the block is then
 * computed again. Of a tile to which that has happened, the maximum is looked for in each later block, to the
 * same end. Each row decides for itself, so it does not depend on its company.
 *
 * Requires product_amx.h; provides attend_wide. */
#include "for_editors_amx.h"

#ifndef FA_KERNEL_ATTEND_PIPELINE_H
#define FA_KERNEL_ATTEND_PIPELINE_H

#include "partial.h"
#include "state.h"
#include "top.h"

/* Units between two looks at whether to stop; the tile unit is set up anew after each. */
#define UNITS_PER_POLL 32

typedef struct {
    tile *t;
    int block; /* of the superblock */
    key_range range;
    score_mods mods;
    packed_vec *probabilities;
} unit;

typedef struct {
    item_state *s;
    int64_t first; /* key of block 0; a multiple of KEY_BLOCK */
    int64_t key_lo, key_hi;
    int num_blocks;
    int tile, block; /* what the next unit begins its search with */
    int units;       /* so far */
    operand_block keys[MAX_SUPERBLOCK_KEYS / KEY_BLOCK];
    const char *values; /* packed: [block][2][part][head_dim_v][32] */
    ptrdiff_t value_bytes;
    part_products key_products, value_products;
    /* The keys that are packed after these, of which some are prefetched beside each unit. */
    const item_arrays *next_arrays;
    int64_t next_key, next_hi;
    int next_per_unit;
} superblock;

/* A block whose second half is behind the last key is half as long. */
FA_INLINE key_range block_range(const superblock *b, const tile *t, int block)
{
    const int64_t first = b->first + (int64_t)block * KEY_BLOCK, end = min_i64(first + KEY_BLOCK, b->key_hi);
    return (key_range){first, end - first <= TILE_K ? first + TILE_K : first + KEY_BLOCK,
                       max_i64(max_i64(first, b->key_lo), t->key_lo), min_i64(end, t->key_hi)};
}

/* False if no row of the tile sees any key. Reads the block's mask into the tile. */
static bool find_unit(const superblock *b, tile *t, int block, unit *u)
{
    const fa_problem *p = b->s->problem;
    u->t = t;
    u->block = block;
    u->range = block_range(b, t, block);
    if (u->range.key_lo >= u->range.key_hi || !tile_sees(t, (fa_interval){u->range.key_lo, u->range.key_hi}))
        return false;
    return sees_block(p, t, &u->range, &u->mods);
}

/* All blocks of a tile, then the next tile's. */
static bool next_unit(superblock *b, unit *u)
{
    for (; b->tile < b->s->num_tiles; b->tile++, b->block = 0)
        while (b->block < b->num_blocks)
            if (find_unit(b, &b->s->w.tiles[b->tile], b->block++, u)) {
                u->probabilities =
                    b->s->w.probabilities + b->units++ % PROBABILITY_PANELS * (MAX_PARTS * PROBABILITY_PART);
                return true;
            }
    return false;
}

/* Scores of float16 are exact: lse is in float32. */
FA_INLINE part_products list_score_products(const fa_problem *p)
{
    return list_part_products(parts_of(p->key.dtype), parts_of(p->query.dtype), p->query.dtype == FA_FLOAT16);
}

/* --- packing ------------------------------------------------------------------------------------ */

static void prefetch_block(const operand_block *block, ptrdiff_t row_bytes)
{
    row_stream rows;
    set_stream(&rows, block->data, block->row, row_bytes, KEY_BLOCK);
    prefetch_rows(&rows, 0, KEY_BLOCK, false);
}

static void pack_superblock(superblock *b)
{
    item_state *s = b->s;
    const fa_problem *p = s->problem;
    char *packed_key = s->w.packed_key;
    fa_interval block;
    for (int64_t begin = b->key_lo; next_block(s, begin, KEY_BLOCK, b->key_hi, &block); begin = block.hi) {
        const int i = (int)((block.lo - b->first) / KEY_BLOCK);
        b->keys[i] = load_key_block(p, &s->arrays, block.lo, block.hi, false, &s->w, packed_key);
        if (b->keys[i].data == packed_key)
            packed_key += packed_key_bytes(p->head_dim);
        else
            prefetch_block(&b->keys[i], 2 * p->head_dim);
        load_value_block(p, &s->arrays, block.lo, block.hi, false, &s->w,
                         s->w.packed_value + i * b->value_bytes);
    }
}

/* The next superblock of the item, or the first one of the next item. */
static void find_next_keys(superblock *b, int64_t keys, int64_t key_hi)
{
    const item_state *s = b->s;
    b->next_arrays = b->key_hi < key_hi ? &s->arrays : s->next ? &s->next_arrays : NULL;
    b->next_key = b->key_hi;
    b->next_hi = key_hi;
    if (b->key_hi == key_hi && s->next) {
        b->next_key = first_key(s->next);
        b->next_hi = s->next->sequence.key_hi;
    }
    b->next_hi = min_i64(b->next_hi, b->next_key + keys);
    const int64_t units = (int64_t)s->num_tiles * b->num_blocks;
    b->next_per_unit = (int)((b->next_hi - b->next_key + units - 1) / units);
}

static void prefetch_next_rows(const superblock *b, const fa_array *array, const char *data, int64_t columns,
                               int count)
{
    row_stream rows = {0};
    stream_rows(&rows, data + key_offset(b->s->problem, b->next_arrays, array, b->next_key), array, columns,
                count);
    prefetch_rows(&rows, 0, count, false);
}

/* Some of the next keys and their values, which lie in one page. */
static void prefetch_next_keys(superblock *b)
{
    const fa_problem *p = b->s->problem;
    const int64_t block_hi = (b->next_key / KEY_BLOCK + 1) * KEY_BLOCK;
    const int count = (int)min_i64(b->next_per_unit, min_i64(block_hi, b->next_hi) - b->next_key);
    if (!b->next_arrays || count <= 0)
        return;
    prefetch_next_rows(b, &p->key, b->next_arrays->key, p->head_dim, count);
    prefetch_next_rows(b, &p->value, b->next_arrays->value, p->head_dim_v, count);
    b->next_key += count;
}

/* --- stages ------------------------------------------------------------------------------------- */

static panel_product scores_product(const superblock *b, const unit *u, vec *scores)
{
    const fa_problem *p = b->s->problem;
    const operand_block *key = &b->keys[u->block];
    if (!u->t->packed)
        pack_tile(p, u->t);
    return (panel_product){.a = key->data,
                           .a_row = key->row,
                           .a_step = key->col,
                           .b = u->t->query,
                           .c = scores,
                           .blocks = num_keys(&u->range) / TMM_ROWS,
                           .steps = (int)((p->head_dim + TILE_K - 1) / TILE_K),
                           .empty = true,
                           .parts = &b->key_products,
                           .a_part = key_part_bytes(p->head_dim),
                           .b_part = query_part_rows(p->head_dim) * MAX_VECTORS};
}

static panel_product value_product_of(const superblock *b, const unit *u)
{
    const int64_t head_dim_v = b->s->problem->head_dim_v;
    return (panel_product){.a = b->values + u->block * b->value_bytes,
                           .a_row = FA_VECTOR_BYTES,
                           .a_step = packed_value_bytes(head_dim_v),
                           .b = u->probabilities,
                           .c = u->t->out,
                           .blocks = (int)((head_dim_v + TMM_ROWS - 1) / TMM_ROWS),
                           .steps = num_keys(&u->range) / TILE_K,
                           .empty = u->t->empty,
                           .parts = &b->value_products,
                           .a_part = value_part_bytes(head_dim_v),
                           .b_part = PROBABILITY_PART};
}

FA_INLINE const packed_range *key_range_of(const superblock *b, const unit *u)
{
    return key_range_at(b->keys[u->block].data, b->s->problem->head_dim);
}

/* What packing has changed in the scores; see operand_split.h. */
static void restore_scores(const superblock *b, const unit *u, vec *scores)
{
    const packed_range *key = key_range_of(b, u), *query = query_range(u->t->query, b->s->problem->head_dim);
    const int count = num_keys(&u->range) * MAX_VECTORS;
    if (key->has_infinity || query->has_infinity) {
        vec *leading = b->s->w.leading_scores;
        panel_product product = scores_product(b, u, leading);
        product.parts = &one_part;
        multiply_panel_alone(&product);
        for (int i = 0; i < count; i++)
            scores[i] = vec_select(vec_equal(scores[i], scores[i]), scores[i], leading[i]);
    }
    for (int i = 0; i < count && key->factor != 1; i++)
        scores[i] *= 1 / range_factors(key)[i / MAX_VECTORS];
    for (int i = 0; i < count && query->factor != 1; i++)
        scores[i] *= 1 / vec_load(range_factors(query) + i % MAX_VECTORS * LANES);
}

FA_INLINE bool restores_scores(const superblock *b, const unit *u)
{
    const packed_range *key = key_range_of(b, u), *query = query_range(u->t->query, b->s->problem->head_dim);
    return key->factor != 1 || key->has_infinity || query->factor != 1 || query->has_infinity;
}

/* Scores that are there: scaled, changed and masked. */
static void finish_scores(const superblock *b, const unit *u, vec *scores)
{
    const fa_problem *p = b->s->problem;
    vec block_max[MAX_VECTORS];
    if (restores_scores(b, u))
        restore_scores(b, u, scores);
    const real scale = scales_in_epilogue(p) ? (real)scale_magnitude(p) : 1;
    for (int i = 0; i < num_keys(&u->range) * MAX_VECTORS && scale != 1; i++)
        scores[i] *= scale;
    mask_rows_behind(u->t, &u->range, scores);
    if (u->mods != 0)
        modify_scores(p, u->t, &u->range, u->mods, scores, block_max);
}

FA_INLINE bool changes_scores(const superblock *b, const unit *u)
{
    const fa_problem *p = b->s->problem;
    return u->mods != 0 || u->range.key_hi < u->range.last || scales_in_epilogue(p) || p->top_count > 0 ||
           restores_scores(b, u);
}

FA_INLINE vmask without_reference(const tile *t, int m)
{
    return vec_equal(t->row_max[m], vec_splat(-(real)INFINITY));
}

/* Rows that have seen no key take their reference from these scores. */
static void find_references(const unit *u, const vec *scores)
{
    tile *t = u->t;
    vec block_max[MAX_VECTORS];
    find_block_max(scores, num_keys(&u->range), MAX_VECTORS, block_max);
    for (int m = 0; m < MAX_VECTORS; m++)
        t->row_max[m] = vec_select(without_reference(t, m), block_max[m], t->row_max[m]);
}

FA_INLINE softmax_stream begin_softmax(const superblock *b, const unit *u, const vec *scores)
{
    const fa_problem *p = b->s->problem;
    const real to_log2 = (real)(deferred_scale(p) * LOG2E);
    softmax_stream f = {.scores = scores,
                        .probabilities = u->probabilities,
                        .rows = num_keys(&u->range),
                        .parts = parts_of(p->query.dtype),
                        .income = num_keys(&u->range) / 2,
                        .to_log2 = vec_splat(to_log2)};
#pragma GCC unroll 4
    for (int i = 0; i < COARSE_TERMS; i++)
        f.coarse[i] = vec_splat(coarse_coefficients[i] / shift_factor(p));
#pragma GCC unroll 2
    for (int m = 0; m < MAX_VECTORS; m++)
        f.row_max[m] = finite_row_max(u->t, m);
    return f;
}

typedef struct {
    vec sum[MAX_VECTORS], exact[MAX_VECTORS];
} block_sums;

FA_INLINE block_sums sums_of(const superblock *b, const softmax_stream *f)
{
    block_sums sums;
#pragma GCC unroll 2
    for (int m = 0; m < MAX_VECTORS; m++) {
        sums.sum[m] = f->sum[m] * shift_factor(b->s->problem);
        sums.exact[m] = f->exact_sum[m];
    }
    return sums;
}

FA_INLINE void add_sums(tile *t, const block_sums *sums)
{
    for (int m = 0; m < MAX_VECTORS; m++) {
        t->row_sum[m] += sums->sum[m];
        t->exact_sum[m] += sums->exact[m];
    }
}

/* Rows in whose block a score may exceed the reference by more than max_excess_log2; those that were NaN
 * already do not count. The coarse exponential may be too small by a little. */
FA_INLINE vmask may_exceed(const superblock *b, const tile *t, int m, vec sum)
{
    const vec most = vec_splat((real)(0.99 * (double)((int64_t)1 << max_excess_log2(b->s->problem))));
    const vmask fits = vec_equal(vec_max(sum, most), most); /* NaN does not: vec_max gives its second */
    const vmask is_number = vec_equal(sum, sum), was_number = vec_equal(t->row_sum[m], t->row_sum[m]);
    return (vmask)(~(fits & is_number) & was_number);
}

FA_INLINE bool any_may_exceed(const superblock *b, const tile *t, const block_sums *sums)
{
    return may_exceed(b, t, 0, sums->sum[0]) | may_exceed(b, t, 1, sums->sum[1]);
}

/* Rows whose scores exceed their reference by more than max_excess_log2, by each lane's largest. */
FA_INLINE vmask exceeds(const superblock *b, const tile *t, int m, const vec block_max[MAX_VECTORS])
{
    const fa_problem *p = b->s->problem;
    const real max_finite = 1e38f, threshold = (real)max_excess_log2(p) / (real)(deferred_scale(p) * LOG2E);
    return vec_greater(block_max[m], t->row_max[m] + (threshold < max_finite ? threshold : max_finite));
}

FA_INLINE void rescale_folded(tile *t, int64_t head_dim_v, const vec rescale[MAX_VECTORS])
{
    rescale_out(t, head_dim_v, MAX_VECTORS, rescale, t->folded_out);
    for (int m = 0; m < MAX_VECTORS; m++)
        t->folded_sum[m] *= rescale[m];
}

/* Raises the references of such rows; what they have summed is there. */
static void rescale_exceeded(const superblock *b, tile *t, const vec block_max[MAX_VECTORS])
{
    const fa_problem *p = b->s->problem;
    const real to_log2 = (real)(deferred_scale(p) * LOG2E);
    vec rescale[MAX_VECTORS];
    for (int m = 0; m < MAX_VECTORS; m++) {
        const vmask raised = exceeds(b, t, m, block_max);
        rescale[m] = vec_select(raised, vec_exp2((t->row_max[m] - block_max[m]) * to_log2), vec_splat(1));
        t->row_max[m] = vec_select(raised, block_max[m], t->row_max[m]);
        t->row_sum[m] *= rescale[m];
        t->exact_sum[m] *= rescale[m];
    }
    if (!t->empty)
        rescale_out(t, p->head_dim_v, MAX_VECTORS, rescale, t->out);
    if (t->folded)
        rescale_folded(t, p->head_dim_v, rescale);
    t->rises = true;
}

/* The block again, from its products on, with the references raised that call for it. Not inlined, nor given
 * the address of the pipeline's own softmax: that would then live in memory. */
static __attribute__((noinline)) void attend_again(const superblock *b, const unit *u, bool exact_sums,
                                                   block_sums *sums)
{
    vec *scores = b->s->w.scores_again, block_max[MAX_VECTORS];
    unit again;
    find_unit(b, u->t, u->block, &again);
    const panel_product product = scores_product(b, &again, scores);
    multiply_panel_alone(&product);
    finish_scores(b, &again, scores);
    find_block_max(scores, num_keys(&again.range), MAX_VECTORS, block_max);
    rescale_exceeded(b, u->t, block_max);
    softmax_stream f = begin_softmax(b, u, scores);
    soften_down_to(&f, exact_sums, 0);
    *sums = sums_of(b, &f);
}

/* Before they meet the values. */
FA_INLINE void drop_unit(const unit *u, const superblock *b)
{
    const fa_problem *p = b->s->problem;
    if (has_dropout(p))
        drop_packed(p, u->t, u->range.first, num_keys(&u->range), parts_of(p->query.dtype), PROBABILITY_PART,
                    u->probabilities);
}

/* P V by itself; there is nothing to add if no unit came before. */
static void multiply_values_alone(const superblock *b, unit *before)
{
    if (!before->t)
        return;
    const panel_product product = value_product_of(b, before);
    multiply_panel_alone(&product);
    before->t->empty = false;
    before->t = NULL;
}

/* Before the softmax of a unit of a tile that rises: the same as attend_again finds out afterwards. */
static __attribute__((noinline)) void rescale_before_softmax(const superblock *b, const unit *u, unit *before,
                                                             const vec *scores)
{
    vec block_max[MAX_VECTORS];
    find_block_max(scores, num_keys(&u->range), MAX_VECTORS, block_max);
    if (!vmask_any((vmask)(exceeds(b, u->t, 0, block_max) | exceeds(b, u->t, 1, block_max))))
        return;
    multiply_values_alone(b, before); /* with the references they were computed with */
    rescale_exceeded(b, u->t, block_max);
}

/* --- the pipeline ------------------------------------------------------------------------------- */

/* Softmax of a unit beside P V of the one before and K Qᵀ of the one behind; either may be missing (no
 * blocks). */
FA_INLINE void run_stages(const panel_product *before, const panel_product *behind, pending_store *pending,
                          softmax_stream *f, bool exact_sums, softmax_pace pace)
{
    const int value_products = before->blocks > 0 ? count_dots(before) : 0;
    const int score_products = behind->blocks > 0 ? count_dots(behind) : 0;
    f->cost = value_products + score_products;
    /* Of a whole block alone are the scores read before those behind it are stored in their place. */
    if (f->rows == KEY_BLOCK && before->steps == 2 && before->blocks > 0 && score_products > 0) {
        multiply_panel(before, pending, f, exact_sums, pace);
        multiply_panel(behind, pending, f, exact_sums, pace);
    } else { /* the first unit, the last, half a block, or no dims */
        if (before->blocks > 0)
            multiply_panel(before, pending, f, exact_sums, PACE_NONE);
        finish_pending(pending); /* of the scores, if P V has not pushed it out */
        soften_down_to(f, exact_sums, 0);
        if (behind->blocks > 0)
            multiply_panel(behind, pending, f, exact_sums, PACE_NONE);
    }
    soften_down_to(f, exact_sums, 0);
}

/* Shapes whose pace is known have copies of their own: nothing is then counted beside the products. */
FA_INLINE void run_unit(const panel_product *before, const panel_product *behind, pending_store *pending,
                        softmax_stream *f, bool exact_sums)
{
    const bool whole = MAX_PARTS == 1 && f->rows == KEY_BLOCK && before->steps == 2 && behind->blocks == 4;
    if (whole && before->blocks == 4 && behind->steps == 2)
        run_stages(before, behind, pending, f, exact_sums, PACE_ROWS);
    else if (whole && before->blocks == 8 && behind->steps == 4)
        run_stages(before, behind, pending, f, exact_sums, PACE_VECTOR);
    else
        run_stages(before, behind, pending, f, exact_sums, PACE_CREDIT);
}

/* False: told to stop. */
FA_INLINE bool attend_superblock(superblock *b, bool exact_sums)
{
    item_state *s = b->s;
    const fa_problem *p = s->problem;
    pending_store pending = {s->w.nowhere, s->w.nowhere};
    unit before = {0}, now, behind;
    if (!next_unit(b, &now))
        return true;
    const panel_product first = scores_product(b, &now, s->w.scores);
    multiply_panel_alone(&first);
    for (unsigned count = 1;; count++) {
        tile *t = now.t;
        bool begins = false;
        for (int m = 0; m < MAX_VECTORS; m++)
            begins |= vmask_any(without_reference(t, m));
        if (begins || t->rises || changes_scores(b, &now)) {
            finish_pending(&pending);
            finish_scores(b, &now, s->w.scores);
            if (p->top_count > 0)
                update_top(p, t, &now.range, s->w.scores, MAX_VECTORS, false);
            if (begins)
                find_references(&now, s->w.scores);
            if (t->rises)
                rescale_before_softmax(b, &now, &before, s->w.scores);
        }
        if (count % UNITS_PER_POLL == 0) {
            finish_pending(&pending);
            if (fa_should_stop(s->stop))
                return false;
            begin_products();
        }
        const bool is_checked = t->rises, more = next_unit(b, &behind);
        panel_product values = {0}, scores = {0};
        if (before.t)
            values = value_product_of(b, &before);
        if (more)
            scores = scores_product(b, &behind, s->w.scores);
        softmax_stream f = begin_softmax(b, &now, s->w.scores);
        prefetch_next_keys(b);
        run_unit(&values, &scores, &pending, &f, exact_sums);
        if (before.t)
            before.t->empty = false;
        block_sums sums = sums_of(b, &f);
        if (__builtin_expect(!is_checked && any_may_exceed(b, t, &sums), 0)) {
            finish_pending(&pending);
            attend_again(b, &now, exact_sums, &sums);
            if (more)
                find_unit(b, behind.t, behind.block, &behind); /* its mask, where the other's is now */
        }
        drop_unit(&now, b);
        add_sums(t, &sums);
        before = now;
        if (!more)
            break;
        now = behind;
    }
    finish_pending(&pending);
    multiply_values_alone(b, &before);
    return true;
}

/* The scores of a block and the panel's range; false if no row sees any of its keys. */
static bool compute_wide_scores(item_state *s, tile *t, const operand_block *key, fa_interval block,
                                key_range *range, vec *scores)
{
    const fa_problem *p = s->problem;
    superblock b = {.s = s,
                    .first = block.lo & -(int64_t)KEY_BLOCK,
                    .key_lo = block.lo,
                    .key_hi = block.hi,
                    .key_products = list_score_products(p)};
    unit u;
    b.keys[0] = *key;
    if (!find_unit(&b, t, 0, &u))
        return false;
    const panel_product product = scores_product(&b, &u, scores);
    multiply_panel_alone(&product);
    finish_scores(&b, &u, scores);
    *range = u.range;
    return true;
}

/* --- values that are not finite ------------------------------------------------------------------ */

FA_INLINE float packed_value(const char *values, ptrdiff_t half_block, int n, int e)
{
    uint16_t bits;
    memcpy(&bits, values + n / TILE_K * half_block + e * FA_VECTOR_BYTES + n % TILE_K * 2, sizeof bits);
    return float_from_bfloat16(bits);
}

/* A packed block with 0 for what is not finite; whether there is such. */
static bool copy_finite(const char *values, ptrdiff_t bytes, char *finite)
{
    uvec any = {0};
    for (ptrdiff_t i = 0; i < bytes; i += FA_VECTOR_BYTES) {
        const halves x = (halves)vec_load(values + i), wrong = (halves)((x & 0x7f80) == 0x7f80);
        any |= (uvec)wrong;
        vec_store(finite + i, (vec)(x & ~wrong));
    }
    return vmask_any(ivec_test((ivec)any, (ivec)any));
}

/* Adds to the rows that see them, and to no others, the products with values that are not finite. */
static void add_not_finite(const superblock *b, const unit *u, const char *values)
{
    const item_state *s = b->s;
    const ptrdiff_t half_block = packed_value_bytes(s->problem->head_dim_v);
    for (int n = 0; n < num_keys(&u->range); n++) {
        for (int e = 0; e < s->problem->head_dim_v; e++) {
            const float value = packed_value(values, half_block, n, e);
            if (isfinite(value))
                continue;
            for (int m = 0; m < MAX_VECTORS; m++) {
                const uvec pair = (uvec)u->probabilities[n / 2 * MAX_VECTORS + m];
                const vec p = n % 2 == 0 ? (vec)(pair << 16) : (vec)(pair & 0xffff0000);
                const vmask hidden = vec_equal(s->w.scores[n * MAX_VECTORS + m], vec_splat(-(real)INFINITY));
                u->t->out[e * MAX_VECTORS + m] += vec_select(hidden, vec_splat(0), p * value);
            }
        }
    }
}

/* The stages of each unit one after the other, to the same bits, with such values kept from rows that do not
 * see them. */
static bool attend_superblock_nan_safe(superblock *b)
{
    item_state *s = b->s;
    unit u;
    for (unsigned count = 1; next_unit(b, &u); count++) {
        if (count % UNITS_PER_POLL == 0) {
            if (fa_should_stop(s->stop))
                return false;
            begin_products();
        }
        const panel_product scores = scores_product(b, &u, s->w.scores);
        multiply_panel_alone(&scores);
        finish_scores(b, &u, s->w.scores);
        if (s->problem->top_count > 0)
            update_top(s->problem, u.t, &u.range, s->w.scores, MAX_VECTORS, false);
        find_references(&u, s->w.scores);
        softmax_stream f = begin_softmax(b, &u, s->w.scores);
        soften_down_to(&f, true, 0);
        block_sums sums = sums_of(b, &f);
        if (any_may_exceed(b, u.t, &sums))
            attend_again(b, &u, true, &sums);
        drop_unit(&u, b);
        panel_product values = value_product_of(b, &u);
        const char *packed = values.a;
        values.a = s->w.finite_values;
        const ptrdiff_t bytes = values.steps * values.a_step;
        const bool all_finite = !copy_finite(packed, bytes, s->w.finite_values);
        multiply_panel_alone(&values);
        u.t->empty = false;
        if (!all_finite)
            add_not_finite(b, &u, packed);
        add_sums(u.t, &sums);
    }
    return true;
}

/* Sums in the tile unit round once for each product of parts: over many keys that would show. So the sums of
 * each superblock start anew, and are added up here. `last`: to what the tile has for its output. */
static void fold_out(tile *t, int64_t vectors, bool last)
{
    vec *to = last ? t->out : t->folded_out;
    const vec *from = last ? t->folded_out : t->out;
    if (last ? !t->folded : t->empty)
        return;
    const bool adds = last ? !t->empty : t->folded;
    for (int m = 0; m < MAX_VECTORS; m++) {
        const vec sum = t->folded ? t->folded_sum[m] + t->row_sum[m] : t->row_sum[m];
        t->row_sum[m] = last ? sum : vec_splat(0);
        t->folded_sum[m] = sum;
    }
    for (int64_t i = 0; i < vectors; i++)
        to[i] = adds ? to[i] + from[i] : from[i];
    t->folded = true;
    t->empty = !last;
}

/* Every wide tile over the keys [key_lo, key_hi), added to its running softmax. */
static void attend_wide(item_state *s, int64_t key_lo, int64_t key_hi, bool nan_safe)
{
    const fa_problem *p = s->problem;
    const int64_t keys = superblock_keys(p);
    superblock b = {.s = s,
                    .values = s->w.packed_value,
                    .value_bytes = value_block_bytes(p->head_dim_v),
                    .key_products = list_score_products(p),
                    .value_products =
                        list_part_products(parts_of(p->value.dtype), parts_of(p->query.dtype), false)};
    for (b.key_lo = key_lo; b.key_lo < key_hi; b.key_lo = b.key_hi) {
        b.first = b.key_lo & -(int64_t)KEY_BLOCK;
        b.key_hi = min_i64(key_hi, (b.key_lo / keys + 1) * keys); /* as blocks: whatever other rows see */
        b.num_blocks = (int)((b.key_hi - b.first + KEY_BLOCK - 1) / KEY_BLOCK);
        b.tile = b.block = 0;
        if (fa_should_stop(s->stop))
            return;
        pack_superblock(&b);
        find_next_keys(&b, keys, key_hi);
        begin_products();
        const bool goes_on = nan_safe                        ? attend_superblock_nan_safe(&b)
                             : p->lse.data && MAX_PARTS == 1 ? attend_superblock(&b, true)
                                                             : attend_superblock(&b, false);
        if (!goes_on)
            return;
        for (int i = 0; i < s->num_tiles && MAX_PARTS > 1; i++)
            fold_out(&s->w.tiles[i], p->head_dim_v * MAX_VECTORS, b.key_hi == key_hi);
    }
    for (int i = 0; i < s->num_tiles && MAX_PARTS > 1; i++)
        memcpy(s->w.tiles[i].exact_sum, s->w.tiles[i].row_sum, sizeof s->w.tiles[i].exact_sum);
}

#endif

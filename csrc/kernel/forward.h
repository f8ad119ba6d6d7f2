/* Forward attention of one work item. Included last by a kernel's source file, which defines
 * FA_KERNEL (the symbol), FA_ISA and FA_NAME (its labels). */
#ifndef FA_KERNEL_FORWARD_H
#define FA_KERNEL_FORWARD_H

#include "item.h"
#include "softmax.h"

/* out[e][m] += Σ_r V[first + r][e] p[r][m]. The sum over the block is formed apart and then added: of
 * many keys, rounding errors grow with the blocks and not with the keys. */
FA_INLINE void multiply_value(const fa_problem *p, const tile *t, const key_range *range,
                              const operand_block *value, const panel *probabilities, const lookahead *ahead,
                              int vectors, bool visible_only)
{
    const char *base = value->data + (range->first / REDUCTION - value->first) * value->row;
    const int length = num_keys(range) / REDUCTION;
    const int rows = MICRO_ROWS(vectors);
    for (int e = 0; e < p->head_dim_v; e += rows) {
        const char *a[MAX_MICRO_ROWS];
        vec c[MAX_MICRO_ROWS][MAX_VECTORS] = {0};
        vec *out = t->out + e * vectors;
        for (int i = 0; i < rows; i++)
            a[i] = base + min_i64(e + i, p->head_dim_v - 1) * value->col;
        prefetch_values_and_out(p, t, ahead, e, rows);
        product(a, value->row, probabilities, length, vectors, visible_only, c);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
            for (int m = 0; m < vectors; m++)
                out[i * vectors + m] = t->fresh ? c[i][m] : out[i * vectors + m] + c[i][m];
    }
}

/* The part of [begin, end) that the tile reads; its ends rounded out to whole operands. */
FA_INLINE key_range tile_range(const tile *t, int64_t begin, int64_t end)
{
    key_range range;
    range.key_lo = max_i64(begin, t->key_lo);
    range.key_hi = min_i64(end, t->key_hi);
    range.first = range.key_lo / REDUCTION * REDUCTION;
    range.last = (range.key_hi + REDUCTION - 1) / REDUCTION * REDUCTION;
    return range;
}

/* Adds a key block to the running softmax of a tile. */
FA_INLINE void attend_block(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                            const operand_block *value, const lookahead *ahead, int vectors,
                            bool visible_only, vec *scores)
{
    if (!compute_scores(p, t, range, key, ahead, vectors, scores))
        return;
    const real to_log2 = (real)(score_unit(p) * LOG2E);
    vec rescale[MAX_VECTORS];
    if (raise_row_max(t, scores, num_keys(range), to_log2, vectors, rescale)) {
        for (int m = 0; m < vectors; m++)
            t->row_sum[m] *= rescale[m];
        if (!t->fresh)
            rescale_out(t, p->head_dim_v, vectors, rescale);
    }
    exponentiate(t, scores, num_keys(range), to_log2, vectors, visible_only);
    const panel *probabilities = pack_probabilities(scores, num_keys(range), vectors);
    multiply_value(p, t, range, value, probabilities, ahead, vectors, visible_only);
    t->fresh = false;
}

/* Writes the weights of a key block, from the finished row_max and row_sum. */
FA_INLINE void write_weights(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                             int vectors, char *const *weights, vec *scores)
{
    const lookahead nothing = {0};
    if (!compute_scores(p, t, range, key, &nothing, vectors, scores))
        return;
    const real to_log2 = (real)(score_unit(p) * LOG2E);
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    for (int m = 0; m < vectors; m++) {
        vec reference = finite_row_max(t, m);
        vec inverse_sum = vec_select(vec_equal(t->row_sum[m], vec_splat(0)), vec_splat(0), 1 / t->row_sum[m]);
        for (int r = 0; r < num_keys(range); r++) {
            vec s = scores[r * vectors + m];
            vec weight = probability((s - reference) * to_log2) * inverse_sum;
            /* 0 even in a row whose sum is NaN */
            scores[r * vectors + m] = vec_select(vec_equal(s, minus_infinity), vec_splat(0), weight);
        }
        for (int64_t n = range->key_lo; n < range->key_hi; n += LANES) {
            int count = (int)min_i64(LANES, range->key_hi - n);
            vec x[LANES];
            for (int j = 0; j < LANES; j++)
                x[j] = scores[(min_i64(n + j, range->key_hi - 1) - range->first) * vectors + m];
            store_square(weights + m * LANES, rows_of_vector(t, m), n * p->weights.col, p->weights.col, count,
                         p->weights.dtype, x);
        }
    }
}

/* Key blocks of different tile widths: one inlined copy for each, chosen per tile and block. */
static void attend_block_any(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                             const operand_block *value, const lookahead *ahead, bool visible_only,
                             vec *scores)
{
    if (visible_only && t->vectors == 1)
        attend_block(p, t, range, key, value, ahead, 1, true, scores);
    else if (visible_only && t->vectors == 2)
        attend_block(p, t, range, key, value, ahead, 2, true, scores);
    else if (visible_only)
        attend_block(p, t, range, key, value, ahead, 3, true, scores);
    else if (t->vectors == 1)
        attend_block(p, t, range, key, value, ahead, 1, false, scores);
    else if (t->vectors == 2)
        attend_block(p, t, range, key, value, ahead, 2, false, scores);
    else
        attend_block(p, t, range, key, value, ahead, 3, false, scores);
}

static void write_weights_any(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                              char *const *weights, vec *scores)
{
    if (t->vectors == 1)
        write_weights(p, t, range, key, 1, weights, scores);
    else if (t->vectors == 2)
        write_weights(p, t, range, key, 2, weights, scores);
    else
        write_weights(p, t, range, key, 3, weights, scores);
}

/* Keys [begin, end) and their values as operands: where they lie, or staged. */
static operand_block load_key_block(const fa_problem *p, const item_arrays *a, int64_t begin, int64_t end,
                                    char *stage)
{
    const char *src = a->key + begin * p->key.row;
    if (key_is_operand(&p->key, p->head_dim))
        return (operand_block){src, begin, p->key.row, operand_step(&p->key)};
    stage_key(src, &p->key, (int)(end - begin), (int)p->head_dim, stage);
    return (operand_block){stage, begin, staged_row_bytes(p->head_dim), sizeof(operand)};
}

static operand_block load_value_block(const fa_problem *p, const item_arrays *a, int64_t begin, int64_t end,
                                      char *stage)
{
    const char *src = a->value + begin * p->value.row;
    if (value_is_operand(&p->value))
        return (operand_block){src, begin, p->value.row, operand_step(&p->value)};
    int lead = (int)(begin % REDUCTION);
    stage_value(src, &p->value, lead, (int)(end - begin), (int)p->head_dim_v, stage);
    return (operand_block){stage, begin / REDUCTION, staged_row_bytes(p->head_dim_v), sizeof(operand)};
}

typedef struct {
    const fa_problem *problem;
    const fa_item *next;
    item_arrays arrays;
    workspace w;
    int num_tiles;
    int64_t key_lo, key_hi; /* keys that some tile reads */
    fa_run *run;
    bool is_caller;
} item_state;

/* Key blocks begin at multiples of KEY_BLOCK, so that a row's sums are grouped the same way whatever
 * else its tile and its item see. */
static int64_t block_end(int64_t begin, int64_t key_hi)
{
    return min_i64((begin / KEY_BLOCK + 1) * KEY_BLOCK, key_hi);
}

/* The keys from `begin` on; after the last, the next item's first ones. */
static void look_ahead_to_keys(const item_state *s, int64_t begin, lookahead *ahead)
{
    const fa_problem *p = s->problem;
    if (begin < s->key_hi) {
        ahead->key = s->arrays.key + begin * p->key.row;
        ahead->value = s->arrays.value + begin * p->value.row;
        ahead->key_rows = (int)(block_end(begin, s->key_hi) - begin);
    } else if (s->next) {
        item_arrays a;
        locate_keys(p, s->next, &a);
        ahead->key = a.key;
        ahead->value = a.value;
        ahead->key_rows = (int)min_i64(a.num_keys, KEY_BLOCK);
    }
}

/* The queries of tile i, which are packed when it meets its first block; after the last tile, the next
 * item's first ones. */
static void look_ahead_to_queries(const item_state *s, int i, lookahead *ahead)
{
    const fa_problem *p = s->problem;
    if (i < s->num_tiles) {
        ahead->query = s->arrays.query + s->arrays.first_head * p->query.head;
        ahead->query_begin = s->w.tiles[i].row_begin;
        ahead->query_rows = s->w.tiles[i].rows;
    } else if (s->next) {
        item_arrays a;
        locate_keys(p, s->next, &a);
        ahead->query = a.query + a.first_head * p->query.head;
        ahead->query_begin = s->next->row_begin;
        ahead->query_rows = (int)min_i64(s->next->row_end - s->next->row_begin, TILE_ROWS);
    }
}

/* Every tile over every key block; false if some result is not finite. */
static bool attend_keys(item_state *s, bool visible_only)
{
    const fa_problem *p = s->problem;
    for (int i = 0; i < s->num_tiles; i++)
        reset_tile(p, &s->arrays, &s->w.tiles[i]);
    for (int64_t begin = s->key_lo, end; begin < s->key_hi; begin = end) {
        if (fa_should_stop(s->run, s->is_caller))
            return true;
        end = block_end(begin, s->key_hi);
        operand_block key = load_key_block(p, &s->arrays, begin, end, s->w.key_stage);
        operand_block value = load_value_block(p, &s->arrays, begin, end, s->w.value_stage);
        bool asked_for_keys = false; /* by one of the tiles */
        for (int i = 0; i < s->num_tiles; i++) {
            tile *t = &s->w.tiles[i];
            key_range range = tile_range(t, begin, end);
            bool last_block = end == s->key_hi;
            if (range.key_lo >= range.key_hi)
                continue;
            lookahead ahead = {0};
            if (last_block)
                ahead.out_rows = t->rows;
            if (!asked_for_keys)
                look_ahead_to_keys(s, end, &ahead);
            if (!t->packed ? i + 1 < s->num_tiles || last_block : last_block && i + 1 == s->num_tiles)
                look_ahead_to_queries(s, i + 1, &ahead);
            if (!t->packed)
                pack_tile(p, t);
            attend_block_any(p, t, &range, &key, &value, &ahead, visible_only, s->w.scores);
            asked_for_keys = true;
        }
    }
    bool clean = true;
    for (int i = 0; i < s->num_tiles; i++)
        clean &= finish_tile(p, &s->w.tiles[i]);
    return clean;
}

/* A second pass: weights need the sums of all keys. */
static void attend_weights(item_state *s)
{
    const fa_problem *p = s->problem;
    for (int64_t begin = s->key_lo, end; begin < s->key_hi; begin = end) {
        if (fa_should_stop(s->run, s->is_caller))
            return;
        end = block_end(begin, s->key_hi);
        operand_block key = load_key_block(p, &s->arrays, begin, end, s->w.key_stage);
        for (int i = 0; i < s->num_tiles; i++) {
            tile *t = &s->w.tiles[i];
            char *weights[TILE_ROWS];
            for (int j = 0; j < t->rows; j++)
                weights[j] = s->arrays.weights + t->head[j] * p->weights.head + t->row[j] * p->weights.row;
            key_range range = tile_range(t, begin, end);
            if (range.key_lo < range.key_hi)
                write_weights_any(p, t, &range, &key, weights, s->w.scores);
        }
    }
}

/* Spreads the item's rows evenly over as few tiles as hold them. */
static void locate_tiles(item_state *s, const fa_item *item)
{
    int64_t rows = item->row_end - item->row_begin;
    int vectors = (int)((rows + LANES - 1) / LANES);
    s->num_tiles = (vectors + MAX_VECTORS - 1) / MAX_VECTORS;
    s->key_lo = INT64_MAX;
    s->key_hi = 0;
    int64_t row = item->row_begin;
    for (int i = 0; i < s->num_tiles; i++) {
        tile *t = &s->w.tiles[i];
        t->vectors = vectors / s->num_tiles + (i < vectors % s->num_tiles);
        t->rows = (int)min_i64(t->vectors * LANES, item->row_end - row);
        locate_rows(s->problem, &s->arrays, row, t);
        s->key_lo = min_i64(s->key_lo, t->key_lo);
        s->key_hi = max_i64(s->key_hi, t->key_hi);
        row += t->rows;
    }
}

static void forward_item(const fa_problem *p, const fa_item *item, const fa_item *next, void *scratch,
                         fa_run *run, bool is_caller)
{
    item_state s = {
        .problem = p, .next = next, .arrays = locate(p, item), .run = run, .is_caller = is_caller};
    int64_t rows = item->row_end - item->row_begin;
    lay_out(p, (int)((rows + TILE_ROWS - 1) / TILE_ROWS), scratch, &s.w);
    locate_tiles(&s, item);
    /* 0 · NaN is NaN: a value that is not finite, under a key that some rows see and others do not, has
     * reached all of them. That shows in the results, and only then are hidden values kept apart. */
    if (!attend_keys(&s, false))
        attend_keys(&s, true);
    if (p->lse.data)
        for (int i = 0; i < s.num_tiles; i++)
            store_lse(p, &s.arrays, &s.w.tiles[i]);
    if (p->weights.data)
        attend_weights(&s);
}

static size_t scratch_bytes(const fa_problem *p, int tiles)
{
    workspace unused;
    return lay_out(p, tiles, NULL, &unused);
}

/* The micro-kernel's multiply-adds with nothing else: all chains in registers. */
static double measure_peak_rounds(int64_t rounds)
{
    enum { CHAINS = MICRO_ROWS(1) == 8 && FA_VECTOR_BYTES == 64 ? 24 : 12 };
    volatile operand source = 0;
    operand a = source;
    vec c[CHAINS];
    for (int i = 0; i < CHAINS; i++)
        c[i] = vec_splat((real)source);
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 24
        for (int i = 0; i < CHAINS; i++)
            c[i] = multiply_add(a, (panel)c[i], c[i]); /* nothing that could be computed once for all */
    }
    real sum = 0;
    for (int i = 0; i < CHAINS; i++)
        sum += c[i][0];
    volatile real sink = sum;
    (void)sink;
    return (double)rounds * CHAINS * LANES * 2 * REDUCTION;
}

const fa_kernel FA_KERNEL = {
    .isa = FA_ISA,
    .name = FA_NAME,
    .lanes = LANES,
    .max_vectors = MAX_VECTORS,
    .key_block = KEY_BLOCK,
    .scratch_bytes = scratch_bytes,
    .forward = forward_item,
    .peak = measure_peak_rounds,
};

#endif

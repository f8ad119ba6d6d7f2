/* An item's arrays, and the beginning and end of its tiles: which row a lane is, what it may see, where its
 * results go.
 *
 * Requires scores.h; provides item_arrays, locate_rows and finish_tile. */
#include "for_editors.h"

#ifndef FA_KERNEL_ITEM_H
#define FA_KERNEL_ITEM_H

#include "dropout.h"
#include "probability_shift.h"
#include "scores.h"

/* The arrays of one batch item and kv head. Those with query heads start at query head 0. */
typedef struct {
    char *query, *key, *value, *mask, *bias, *out, *lse, *weights, *alibi_slopes, *sinks;
    char *key_scale, *value_scale;
    char *top_indices, *top_weights, *column_sums;
    const int64_t *pages; /* where keys lie, if in pages */
    int64_t num_keys, query_offset;
    int64_t group_size, first_head;
    int64_t batch_item; /* in order */
} item_arrays;

static char *at_batch(const fa_array *array, const fa_problem *p, const fa_work_item *item)
{
    return array->data ? array->data + batch_offset(array, p, item->batch_index) : NULL;
}

/* Of the item's kv head and sequence. */
static char *at_keys(const fa_array *array, const fa_problem *p, const fa_work_item *item)
{
    char *data = at_batch(array, p, item);
    return data ? data + item->kv_head * array->head + item->sequence.first_key * array->row : NULL;
}

static char *at_queries(const fa_array *array, const fa_problem *p, const fa_work_item *item)
{
    char *data = at_batch(array, p, item);
    return data ? data + item->sequence.first_query * array->row : NULL;
}

static item_arrays locate(const fa_problem *p, const fa_work_item *item)
{
    item_arrays a;
    a.key = at_keys(&p->key, p, item);
    a.value = at_keys(&p->value, p, item);
    a.key_scale = at_keys(&p->key_scale, p, item);
    a.value_scale = at_keys(&p->value_scale, p, item);
    a.pages = (const int64_t *)at_batch(&p->page_table, p, item);
    a.query = at_queries(&p->query, p, item);
    a.num_keys = item->sequence.num_keys;
    a.query_offset = item->sequence.query_offset;
    a.group_size = p->num_heads / p->num_kv_heads;
    a.first_head = item->kv_head * a.group_size;
    a.batch_item = 0;
    for (int axis = 0; axis < p->batch_ndim && has_dropout(p); axis++)
        a.batch_item = a.batch_item * p->batch_shape[axis] + item->batch_index[axis];
    a.mask = at_batch(&p->mask, p, item);
    a.bias = at_batch(&p->bias, p, item);
    a.out = at_queries(&p->out, p, item);
    a.lse = at_queries(&p->lse, p, item);
    a.weights = at_batch(&p->weights, p, item);
    a.alibi_slopes = at_batch(&p->alibi_slopes, p, item);
    a.sinks = at_batch(&p->sinks, p, item);
    a.top_indices = at_batch(&p->top_indices, p, item);
    a.top_weights = at_batch(&p->top_weights, p, item);
    a.column_sums = at_batch(&p->column_sums, p, item);
    return a;
}

/* From the item's first key to key n. A block of keys lies in one page. */
FA_INLINE ptrdiff_t key_offset(const fa_problem *p, const item_arrays *a, const fa_array *array, int64_t n)
{
    if (!a->pages)
        return n * array->row;
    return a->pages[n / p->page_size] * array->page + n % p->page_size * array->row;
}

/* Keys, or values, from n on. */
FA_INLINE source_rows rows_from(const fa_problem *p, const item_arrays *a, const fa_array *array,
                                const char *data, const fa_array *scales, const char *scale, int64_t n)
{
    source_rows src = {.data = data + key_offset(p, a, array, n), .array = array};
    if (scale) {
        src.scale = scale + key_offset(p, a, scales, n);
        src.scale_step = scales->row;
    }
    return src;
}

/* Position and head of each lane's row; lanes beyond the last row repeat it, and the keys that share a decode
 * tile's vector repeat all of them. */
static void number_rows(const item_arrays *a, int64_t row_begin, tile *t)
{
    if (a->group_size == 1 && !is_decode(t)) { /* without branches: it counts where sequences are short */
        for (int j = 0; j < t->vectors * LANES; j++) {
            t->lane_key[j] = 0;
            t->row[j] = row_begin + min_i64(j, t->rows - 1);
            t->head[j] = a->first_head;
        }
        return;
    }
    int64_t row = row_begin / a->group_size, head = row_begin % a->group_size;
    for (int j = 0; j < t->vectors * LANES; j++) {
        const bool repeats = is_decode(t) && j >= t->rows_pow2;
        t->lane_key[j] = repeats ? t->lane_key[j - t->rows_pow2] + 1 : 0;
        t->row[j] = repeats ? t->row[j - t->rows_pow2] : row;
        t->head[j] = repeats ? t->head[j - t->rows_pow2] : a->first_head + head;
        if (j + 1 < t->rows && ++head == a->group_size) {
            head = 0;
            row++;
        }
    }
}

/* The keys that each lane's row may see: an interval, whatever masks more of them. */
static void find_intervals(const fa_problem *p, const item_arrays *a, tile *t)
{
    const int64_t num_keys = a->num_keys;
    t->key_lo = t->full_lo = 0;
    t->key_hi = t->full_hi = num_keys;
    for (int j = 0; j < t->vectors * LANES; j++) {
        t->lo[j] = 0;
        t->hi[j] = num_keys;
    }
    if (p->left == FA_UNBOUNDED && p->right == FA_UNBOUNDED)
        return;
    t->key_lo = INT64_MAX;
    t->key_hi = 0;
    for (int j = 0; j < t->vectors * LANES; j++) {
        const fa_interval keys = fa_row_interval(p, t->row[j] + a->query_offset, num_keys);
        t->lo[j] = keys.lo;
        t->hi[j] = keys.hi;
        t->full_lo = max_i64(t->full_lo, keys.lo);
        t->full_hi = min_i64(t->full_hi, keys.hi);
        if (keys.lo < keys.hi) {
            t->key_lo = min_i64(t->key_lo, keys.lo);
            t->key_hi = max_i64(t->key_hi, keys.hi);
        }
    }
}

/* Where each lane's row starts in an array of (head, row, col). */
FA_INLINE void point_at_rows(const tile *t, char *base, const fa_array *array, char **rows)
{
    for (int j = 0; j < t->vectors * LANES; j++)
        rows[j] = base + t->head[j] * array->head + t->row[j] * array->row;
}

static void load_alibi(const fa_problem *p, const item_arrays *a, tile *t)
{
    for (int j = 0; j < t->vectors * LANES; j++) {
        const char *slope = a->alibi_slopes + t->head[j] * p->alibi_slopes.head;
        t->slope[j / LANES][j % LANES] = (real)load_element(slope, FA_FLOAT64);
        t->position[j] = t->row[j] + a->query_offset;
    }
}

/* Where the rows' probabilities are, for dropout. */
static void number_probabilities(const item_arrays *a, tile *t)
{
    t->drop_item = (uint32_t)a->batch_item;
    for (int j = 0; j < t->vectors * LANES; j++) {
        t->drop_position[j / LANES][j % LANES] = (uint32_t)(t->row[j] + a->query_offset);
        t->drop_head[j / LANES][j % LANES] = (uint32_t)t->head[j];
    }
}

static void locate_rows(const fa_problem *p, const item_arrays *a, int64_t row_begin, tile *t)
{
    t->row_begin = row_begin;
    t->packed = false;
    number_rows(a, row_begin, t);
    find_intervals(p, a, t);
    point_at_rows(t, a->query, &p->query, t->query_row);
    point_at_rows(t, a->out, &p->out, t->out_row);
    if (a->mask)
        point_at_rows(t, a->mask, &p->mask, t->mask);
    if (a->bias)
        point_at_rows(t, a->bias, &p->bias, t->bias);
    if (a->alibi_slopes)
        load_alibi(p, a, t);
    if (has_dropout(p))
        number_probabilities(a, t);
}

static void move_rows(const tile *t, ptrdiff_t mods, char **rows)
{
    for (int j = 0; j < t->vectors * LANES; j++)
        rows[j] += mods;
}

/* locate_rows, of a tile that is there for the same rows of another item: where sequences are short, that
 * would be a twentieth of the work. */
static void move_tile(const fa_problem *p, const item_arrays *from, const item_arrays *to, tile *t)
{
    const int64_t heads = to->first_head - from->first_head;
    t->packed = false;
    move_rows(t, to->query - from->query + heads * p->query.head, t->query_row);
    move_rows(t, to->out - from->out + heads * p->out.head, t->out_row);
    if (to->mask)
        move_rows(t, to->mask - from->mask + heads * p->mask.head, t->mask);
    if (to->bias)
        move_rows(t, to->bias - from->bias + heads * p->bias.head, t->bias);
    for (int j = 0; j < t->vectors * LANES; j++)
        t->head[j] += heads;
    if (to->alibi_slopes)
        load_alibi(p, to, t);
    if (has_dropout(p))
        number_probabilities(to, t);
}

static void pack_tile(const fa_problem *p, tile *t)
{
    const real sign = (real)scale_sign(p);
    if (is_decode(t))
        pack_decode_queries(t->query_row, t->rows_pow2, p, sign, t->query);
    else
        pack_query(t->query_row, p->query.col, p->query.dtype, (int)p->head_dim, t->vectors, sign, t->query);
    t->packed = true;
}

/* The running softmax of no keys; a sink is a score that is there from the start and adds no value. Of
 * splits, the first has the sink; of the lanes of a row, the first. */
static void reset_tile(const fa_problem *p, const item_arrays *a, bool with_sinks, tile *t)
{
    for (int m = 0; m < t->vectors; m++) {
        t->row_max[m] = vec_splat(-(real)INFINITY);
        t->row_sum[m] = vec_splat(0);
    }
    if (a->sinks && with_sinks) {
        for (int j = 0; j < t->vectors * LANES; j++) {
            double sink = load_element(a->sinks + t->head[j] * p->sinks.head, FA_FLOAT64);
            t->row_max[j / LANES][j % LANES] = (real)sink;
            /* e^(sink - row_max), which is NaN for sinks that are NaN or inf */
            bool counts = sink != -INFINITY && t->lane_key[j] == 0;
            t->row_sum[j / LANES][j % LANES] = counts ? (real)(1 + (sink - sink)) : 0;
        }
    }
    memcpy(t->exact_sum, t->row_sum, sizeof t->exact_sum);
    t->rises = t->folded = false;
    t->empty = true;
}

/* What has met no key is there as zeros from now on. */
static void fill_if_empty(const fa_problem *p, tile *t)
{
    if (t->empty)
        memset(t->out, 0, (size_t)out_vectors(t, p->head_dim_v) * sizeof(vec));
    t->empty = false;
}

FA_INLINE vec inverse_or_zero(vec x)
{
    return vec_select(vec_equal(x, vec_splat(0)), vec_splat(0), 1 / x);
}

/* Whether results are finite, by their sums; those of finite ones may overflow, so false is to be looked
 * into.
 */
FA_INLINE bool are_finite(vec sums)
{
    const vec zero = vec_splat(0);
    vec wrong = vec_select(vec_equal(sums - sums, zero), zero, vec_splat(1));
    return !vmask_any(vec_greater(wrong, zero));
}

/* Whether every element that a tile has summed is finite. */
static bool is_finite_out(const fa_problem *p, const tile *t)
{
    vec zeros = {0};
    for (int64_t i = 0; !t->empty && i < out_vectors(t, p->head_dim_v); i++)
        zeros += t->out[i] - t->out[i];
    return are_finite(zeros);
}

FA_INLINE double lse_of_row(const fa_problem *p, const tile *t, int j)
{
    const double row_max = t->row_max[j / LANES][j % LANES], exact_sum = t->exact_sum[j / LANES][j % LANES];
    return row_max * deferred_scale(p) + log(exact_sum);
}

FA_INLINE char *place_of_lse(const fa_problem *p, const item_arrays *a, const tile *t, int j)
{
    return a->lse + t->head[j] * p->lse.head + t->row[j] * p->lse.row;
}

static void store_lse(const fa_problem *p, const item_arrays *a, const tile *t)
{
    for (int j = 0; j < t->rows; j++)
        store_element(place_of_lse(p, a, t, j), p->lse.dtype, (real)lse_of_row(p, t, j));
}

/* The shares of a row's results that are there and of those of the tile's keys, by the lse of each; stores
 * that of both. */
static void share_results(const fa_problem *p, const item_arrays *a, tile *t)
{
    vec before[MAX_VECTORS] = {{0}}, now[MAX_VECTORS] = {{0}};
    for (int j = 0; j < t->rows; j++) {
        before[j / LANES][j % LANES] = (real)load_element(place_of_lse(p, a, t, j), p->lse.dtype);
        now[j / LANES][j % LANES] = (real)lse_of_row(p, t, j);
    }
    for (int m = 0; m < t->vectors; m++) {
        vec largest = vec_max(before[m], now[m]);
        largest = vec_select(vec_equal(largest, vec_splat(-(real)INFINITY)), vec_splat(0), largest);
        const vec of_before = vec_exp2((before[m] - largest) * (real)LOG2E);
        const vec of_now = vec_exp2((now[m] - largest) * (real)LOG2E);
        const vec sum = of_before + of_now, inverse_sum = inverse_or_zero(sum);
        const vmask none = vec_equal(before[m], vec_splat(-(real)INFINITY));
        t->share_before[m] = vec_select(none, vec_splat(-1), of_before * inverse_sum);
        t->share[m] = of_now * inverse_sum;
        for (int j = m * LANES; j < m * LANES + rows_of_vector(t, m); j++)
            store_element(place_of_lse(p, a, t, j), p->lse.dtype,
                          (real)(largest[j % LANES] + log(sum[j % LANES])));
    }
}

/* What remains of the results that are there. Over no keys they may hold anything. */
FA_INLINE vec share_of(vec before, vec share)
{
    const vec zero = vec_splat(0);
    return vec_select(vec_greater(zero, share), zero, before * share);
}

/* Normalises and stores a decode tile; the results' sums. */
FA_INLINE vec finish_decode_rows(const fa_problem *p, const tile *t, ptrdiff_t col, fa_dtype dtype)
{
    vec sums = {0};
    real inverse_sum[LANES];
    vec_store(inverse_sum, inverse_or_zero(t->row_sum[0]) * (p->adds ? t->share[0] : vec_splat(1)));
    const int vectors = vectors_of(p->head_dim_v);
    for (int r = 0; r < t->rows; r++) {
        for (int i = 0; i < vectors; i++) {
            int count = (int)min_i64(LANES, p->head_dim_v - i * LANES);
            char *to = t->out_row[r] + i * LANES * col;
            vec x = t->out[r * vectors + i] * inverse_sum[r];
            if (p->adds)
                x += share_of(load_elements(to, col, count, dtype), vec_splat(t->share_before[0][r]));
            sums += x;
            store_elements(to, col, count, dtype, x);
        }
    }
    return sums;
}

/* Normalises and stores; false if some result may not be finite. As for packing, the usual dtype and stride
 * have a copy of their own. */
static bool finish_decode_tile(const fa_problem *p, const tile *t)
{
    order_decode_out(p, t);
    const fa_dtype usual = PRODUCTS_IN_BFLOAT16 ? FA_BFLOAT16 : FA_REAL_DTYPE;
    if (p->out.dtype == usual && p->out.col == element_size(usual))
        return are_finite(finish_decode_rows(p, t, element_size(usual), usual));
    return are_finite(finish_decode_rows(p, t, p->out.col, p->out.dtype));
}

/* Of a wide tile: elements [e, e + count) of the rows of vector m, normalised and stored; their sums. */
FA_INLINE vec finish_lanes(const fa_problem *p, const tile *t, int m, int e, int count, vec inverse_sum)
{
    const vec *out = t->out + e * t->vectors + m;
    vec x[LANES], sums[4] = {0}; /* four: each addition waits for the one before */
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
        x[j] = out[(j < count ? j : 0) * t->vectors] * inverse_sum;
        sums[j % 4] += x[j];
    }
    store_transposed(t->out_row + m * LANES, rows_of_vector(t, m), e * p->out.col, p->out.col, count,
                     p->out.dtype, x);
    return sums[0] + sums[1] + (sums[2] + sums[3]);
}

/* finish_lanes of results that join those that are there. */
static void add_lanes(const fa_problem *p, const tile *t, int m, int e, int count, vec inverse_sum)
{
    char *const *rows = t->out_row + m * LANES;
    vec x[LANES] = {{0}};
    load_transposed(rows, e * p->out.col, p->out.col, count, FA_REAL_DTYPE, x);
    for (int i = 0; i < count; i++)
        x[i] = share_of(x[i], t->share_before[m]) + t->out[(e + i) * t->vectors + m] * inverse_sum;
    store_transposed(rows, rows_of_vector(t, m), e * p->out.col, p->out.col, count, FA_REAL_DTYPE, x);
}

/* As finish_tile, of a wide tile. */
static void add_tile(const fa_problem *p, const tile *t)
{
    for (int m = 0; m < t->vectors; m++) {
        const vec factor = t->share[m] * (shift_factor(p) * kept_factor(p));
        for (int e = 0; e < p->head_dim_v; e += LANES)
            add_lanes(p, t, m, e, (int)min_i64(LANES, p->head_dim_v - e),
                      inverse_or_zero(t->row_sum[m]) * factor);
    }
}

static bool finish_tile(const fa_problem *p, tile *t)
{
    vec sums = {0};
    fill_if_empty(p, t);
    if (is_decode(t))
        return finish_decode_tile(p, t);
    if (p->adds) {
        add_tile(p, t);
        return true;
    }
    for (int m = 0; m < t->vectors; m++) {
        vec inverse_sum = inverse_or_zero(t->row_sum[m]) * (shift_factor(p) * kept_factor(p));
        int e = 0;
        for (; e + LANES <= p->head_dim_v; e += LANES)
            sums += finish_lanes(p, t, m, e, LANES, inverse_sum);
        if (e < p->head_dim_v)
            sums += finish_lanes(p, t, m, e, (int)p->head_dim_v - e, inverse_sum);
    }
    return are_finite(sums);
}

#endif

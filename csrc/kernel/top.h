/* What is kept of the weights where nobody can hold them all: each row's largest, and each key's total.
 *
 * Requires item.h and softmax.h; provides update_top, store_top and add_column_sums. */
#include "for_editors.h"

#ifndef FA_KERNEL_TOP_H
#define FA_KERNEL_TOP_H

#include <stdatomic.h>

#include "item.h"
#include "softmax.h"

/* A row's list, as a heap whose first entry is the one that the next larger score replaces. */
typedef struct {
    real *scores;
    int64_t *keys;
    int size;
} top_list;

FA_INLINE top_list list_of(const fa_problem *p, const tile *t, int row)
{
    const ptrdiff_t begin = (ptrdiff_t)row * p->top_count;
    return (top_list){t->top_scores + begin, t->top_keys + begin, t->top_size[row]};
}

/* Of equal scores that of the earlier key ranks higher. */
FA_INLINE bool ranks_below(const top_list *l, int i, int j)
{
    return l->scores[i] < l->scores[j] || (l->scores[i] == l->scores[j] && l->keys[i] > l->keys[j]);
}

FA_INLINE void swap_entries(top_list *l, int i, int j)
{
    const real score = l->scores[i];
    const int64_t key = l->keys[i];
    l->scores[i] = l->scores[j];
    l->keys[i] = l->keys[j];
    l->scores[j] = score;
    l->keys[j] = key;
}

static void sift_up(top_list *l, int i)
{
    for (int parent; i > 0 && ranks_below(l, i, parent = (i - 1) / 2); i = parent)
        swap_entries(l, i, parent);
}

static void sift_down(top_list *l)
{
    for (int i = 0, child; (child = 2 * i + 1) < l->size; i = child) {
        if (child + 1 < l->size && ranks_below(l, child + 1, child))
            child++;
        if (ranks_below(l, i, child))
            return;
        swap_entries(l, i, child);
    }
}

/* The highest first: each step moves the lowest of those left behind them. */
static void sort_list(top_list *l)
{
    while (l->size > 1) {
        swap_entries(l, 0, --l->size);
        sift_down(l);
    }
}

static void insert_top(const fa_problem *p, tile *t, int row, real score, int64_t key)
{
    top_list l = list_of(p, t, row);
    if (l.size < p->top_count) {
        l.scores[l.size] = score;
        l.keys[l.size] = key;
        sift_up(&l, l.size);
        t->top_size[row] = ++l.size;
    } else {
        l.scores[0] = score;
        l.keys[0] = key;
        sift_down(&l);
    }
    if (l.size < p->top_count)
        return;
    const int lanes = is_decode(t) ? LANES : row + 1, step = is_decode(t) ? t->rows_pow2 : 1;
    for (int j = row; j < lanes; j += step)
        t->top_least[j / LANES][j % LANES] = l.scores[0];
}

/* Few scores are larger than the least in a list once some keys have been seen: the comparison is what costs.
 */
FA_INLINE void update_top(const fa_problem *p, tile *t, const key_range *range, const vec *scores,
                          int vectors, bool decode)
{
    for (int r = 0; r < panel_rows(t, range, decode); r++) {
        for (int m = 0; m < vectors; m++) {
            vec s = scores[r * vectors + m];
            if (!vmask_any(vec_greater(s, t->top_least[m])))
                continue;
            for (int j = m * LANES; j < (m + 1) * LANES; j++) {
                int row = row_of_lane(t, j);
                int64_t key = range->first + (r << t->key_shift) + t->lane_key[j];
                if (row < t->rows && s[j % LANES] > t->top_least[m][j % LANES])
                    insert_top(p, t, row, s[j % LANES], key);
            }
        }
    }
}

static void reset_top(const fa_problem *p, tile *t)
{
    if (p->top_count == 0)
        return;
    memset(t->top_size, 0, sizeof t->top_size);
    for (int m = 0; m < t->vectors; m++)
        t->top_least[m] = vec_splat(-(real)INFINITY);
}

/* Scores become weights; what a list lacks is key -1 of weight 0. */
static void store_top(const fa_problem *p, const item_arrays *a, const tile *t)
{
    const real to_log2 = (real)(deferred_scale(p) * LOG2E);
    for (int row = 0; row < t->rows; row++) {
        const int m = row / LANES, lane_of_row = row % LANES;
        const real reference = finite_row_max(t, m)[lane_of_row];
        const real inverse_sum = inverse_or_zero(t->row_sum[m])[lane_of_row];
        char *index = a->top_indices + t->head[row] * p->top_indices.head + t->row[row] * p->top_indices.row;
        char *weight = a->top_weights + t->head[row] * p->top_weights.head + t->row[row] * p->top_weights.row;
        top_list l = list_of(p, t, row);
        sort_list(&l);
        for (int64_t i = 0; i < p->top_count; i++) {
            bool there = i < t->top_size[row];
            vec w = vec_exp2(vec_splat(there ? (l.scores[i] - reference) * to_log2 : 0)) * inverse_sum;
            *(int64_t *)(index + i * p->top_indices.col) = there ? l.keys[i] : -1;
            store_element(weight + i * p->top_weights.col, p->top_weights.dtype, there ? w[0] : 0);
        }
    }
}

/* A weight in units of 1 / fixed_point_scale, rounded: sums of integers do not depend on their order. Those
 * of a row that is NaN count for nothing. */
FA_INLINE int64_t in_units(const fa_problem *p, double weight)
{
    return weight == weight ? (int64_t)(weight * p->fixed_point_scale + 0.5) : 0;
}

static void add_column_sum(const fa_problem *p, char *column_sums, int64_t head, int64_t key, int64_t units)
{
    char *total = column_sums + head * p->column_sums.head + key * p->column_sums.col;
    atomic_fetch_add_explicit((_Atomic int64_t *)total, units, memory_order_relaxed);
}

static void add_decode_column_sums(const fa_problem *p, const tile *t, const key_range *range,
                                   const vec *weights, char *column_sums)
{
    const real *weight = (const real *)weights;
    for (int64_t n = range->key_lo; n < range->key_hi; n++)
        for (int row = 0; row < t->rows; row++)
            add_column_sum(p, column_sums, t->head[row], n,
                           in_units(p, weight[(n - range->first) * t->rows_pow2 + row]));
}

/* The tile's weights of one head, LANES keys at a time. Rows are summed by the vector, which holds the same
 * ones however the work is cut. */
static void add_head_column_sums(const fa_problem *p, const tile *t, const key_range *range, int64_t head,
                                 const vec *weights, char *column_sums)
{
    ivec of_head[MAX_VECTORS] = {0};
    for (int j = 0; j < t->rows; j++)
        of_head[j / LANES][j % LANES] = -(t->head[j] == head);
    for (int64_t n = range->key_lo; n < range->key_hi; n += LANES) {
        const int count = (int)min_i64(LANES, range->key_hi - n);
        int64_t units[LANES] = {0};
        for (int m = 0; m < t->vectors; m++) {
            vec x[LANES] = {0};
            for (int i = 0; i < count; i++) {
                vec w = weights[(n + i - range->first) * t->vectors + m];
                w = vec_select(vec_equal(w, w), w, vec_splat(0));
                x[i] = (vec)((ivec)w & of_head[m]);
            }
            vec sums = vec_sums(x);
            for (int i = 0; i < count; i++)
                units[i] += in_units(p, sums[i]);
        }
        for (int i = 0; i < count; i++)
            add_column_sum(p, column_sums, head, n + i, units[i]);
    }
}

static void add_column_sums(const fa_problem *p, const item_arrays *a, const tile *t, const key_range *range,
                            const vec *weights)
{
    if (is_decode(t)) {
        add_decode_column_sums(p, t, range, weights, a->column_sums);
        return;
    }
    for (int64_t head = a->first_head; head < a->first_head + a->group_size; head++)
        add_head_column_sums(p, t, range, head, weights, a->column_sums);
}

#endif

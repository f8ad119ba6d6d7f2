/* What is kept of the weights where nobody can hold them all: each row's largest, and each key's total. */
#ifndef FA_KERNEL_TOP_H
#define FA_KERNEL_TOP_H

#include <stdatomic.h>

#include "item.h"

/* A row's list is in falling order; an equal score comes after those before it, which are of earlier keys. */
static void insert_top(const fa_problem *p, tile *t, int row, real score, int64_t key)
{
    const int capacity = (int)p->top_count;
    real *scores = t->top_scores + (ptrdiff_t)row * capacity;
    int64_t *keys = t->top_keys + (ptrdiff_t)row * capacity;
    int i = t->top_size[row] < capacity ? t->top_size[row]++ : capacity - 1;
    for (; i > 0 && scores[i - 1] < score; i--) {
        scores[i] = scores[i - 1];
        keys[i] = keys[i - 1];
    }
    scores[i] = score;
    keys[i] = key;
    if (t->top_size[row] == capacity)
        for (int j = 0; j < t->vectors * LANES; j++)
            if (row_of_lane(t, j) == row)
                t->top_least[j / LANES][j % LANES] = scores[capacity - 1];
}

/* Few scores are larger than the least in a list once some keys have been seen: the comparison is what costs.
 */
FA_INLINE void update_top(const fa_problem *p, tile *t, const key_range *range, const vec *scores,
                          int vectors, bool narrow)
{
    for (int r = 0; r < panel_rows(t, range, narrow); r++) {
        for (int m = 0; m < vectors; m++) {
            vec s = scores[r * vectors + m];
            if (!vmask_any(vec_greater(s, t->top_least[m])))
                continue;
            for (int j = m * LANES; j < (m + 1) * LANES; j++) {
                int row = row_of_lane(t, j);
                int64_t key = range->first + r * keys_per_row(t, narrow) + t->lane_key[j];
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
    const real to_log2 = (real)(score_unit(p) * LOG2E);
    for (int row = 0; row < t->rows; row++) {
        const int m = row / LANES, lane_of_row = row % LANES;
        const real reference = finite_row_max(t, m)[lane_of_row];
        const real inverse_sum = inverse_or_zero(t->row_sum[m])[lane_of_row];
        char *index = a->top_indices + t->head[row] * p->top_indices.head + t->row[row] * p->top_indices.row;
        char *weight = a->top_weights + t->head[row] * p->top_weights.head + t->row[row] * p->top_weights.row;
        const real *scores = t->top_scores + row * p->top_count;
        const int64_t *keys = t->top_keys + row * p->top_count;
        for (int64_t i = 0; i < p->top_count; i++) {
            bool there = i < t->top_size[row];
            real w = there ? probability(split_exponent(vec_splat((scores[i] - reference) * to_log2)))[0] * inverse_sum : 0;
            *(int64_t *)(index + i * p->top_indices.col) = there ? keys[i] : -1;
            store_element(weight + i * p->top_weights.col, p->top_weights.dtype, w);
        }
    }
}

/* Totals are integers, in units of 1 / total_unit: their sum does not depend on the order. */
static void add_total(const fa_problem *p, char *totals, int64_t head, int64_t key, double weight)
{
    char *total = totals + head * p->totals.head + key * p->totals.col;
    if (weight == weight) /* the weights of a row that is NaN count for nothing */
        atomic_fetch_add_explicit((_Atomic int64_t *)total, (int64_t)(weight * p->total_unit + 0.5),
                                  memory_order_relaxed);
}

static void add_narrow_totals(const fa_problem *p, const tile *t, const key_range *range, const vec *weights,
                              char *totals)
{
    const real *weight = (const real *)weights;
    for (int64_t n = range->key_lo; n < range->key_hi; n++)
        for (int row = 0; row < t->rows; row++)
            add_total(p, totals, t->head[row], n, weight[(n - range->first) * t->narrow + row]);
}

/* The tile's weights of one head, LANES keys at a time. */
static void add_head_totals(const fa_problem *p, const tile *t, const key_range *range, int64_t head,
                            const vec *weights, char *totals)
{
    ivec of_head[MAX_VECTORS] = {0};
    for (int j = 0; j < t->rows; j++)
        of_head[j / LANES][j % LANES] = -(t->head[j] == head);
    for (int64_t n = range->key_lo; n < range->key_hi; n += LANES) {
        const int count = (int)min_i64(LANES, range->key_hi - n);
        vec x[LANES] = {0};
        for (int i = 0; i < count; i++)
            for (int m = 0; m < t->vectors; m++) {
                vec w = weights[(n + i - range->first) * t->vectors + m];
                x[i] += (vec)((ivec)w & of_head[m]);
            }
        vec sums = vec_sums(x);
        for (int i = 0; i < count; i++)
            add_total(p, totals, head, n + i, sums[i]);
    }
}

static void add_totals(const fa_problem *p, const item_arrays *a, const tile *t, const key_range *range,
                       const vec *weights)
{
    if (is_narrow(t)) {
        add_narrow_totals(p, t, range, weights, a->totals);
        return;
    }
    for (int64_t head = a->first_head; head < a->first_head + a->group; head++)
        add_head_totals(p, t, range, head, weights, a->totals);
}

#endif

/* The running softmaxes of a tile over disjoint keys, and their merging.
 *
 * Requires softmax.h; provides save_partial, load_partial and merge_partial. */
#include "for_editors.h"

#ifndef FA_KERNEL_PARTIAL_H
#define FA_KERNEL_PARTIAL_H

#include "softmax.h"

static void save_partial(const fa_problem *p, const tile *t, partial *to)
{
    memcpy(to->row_max, t->row_max, sizeof t->row_max);
    memcpy(to->row_sum, t->row_sum, sizeof t->row_sum);
    memcpy(to->exact_sum, t->exact_sum, sizeof t->exact_sum);
    memcpy(to->out, t->out, (size_t)out_vectors(t, p->head_dim_v) * sizeof(vec));
}

static void load_partial(const fa_problem *p, const partial *from, tile *t)
{
    memcpy(t->row_max, from->row_max, sizeof t->row_max);
    memcpy(t->row_sum, from->row_sum, sizeof t->row_sum);
    memcpy(t->exact_sum, from->exact_sum, sizeof t->exact_sum);
    memcpy(t->out, from->out, (size_t)out_vectors(t, p->head_dim_v) * sizeof(vec));
    t->empty = false;
}

/* Adds to a tile's running softmax over some keys, `total`, that over further keys, which is used up. */
static void merge_partial(const fa_problem *p, const tile *t, real to_log2, partial *total, partial *later)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    vec keep[MAX_VECTORS], add[MAX_VECTORS];
    for (int m = 0; m < t->vectors; m++) {
        vec row_max = vec_max(total->row_max[m], later->row_max[m]);
        vec reference = vec_select(vec_equal(row_max, minus_infinity), vec_splat(0), row_max);
        keep[m] = vec_exp2((total->row_max[m] - reference) * to_log2);
        add[m] = vec_exp2((later->row_max[m] - reference) * to_log2);
        total->row_sum[m] = total->row_sum[m] * keep[m] + later->row_sum[m] * add[m];
        total->exact_sum[m] = total->exact_sum[m] * keep[m] + later->exact_sum[m] * add[m];
        total->row_max[m] = row_max;
    }
    rescale_out(t, p->head_dim_v, t->vectors, keep, total->out);
    rescale_out(t, p->head_dim_v, t->vectors, add, later->out);
    for (int64_t i = 0; i < out_vectors(t, p->head_dim_v); i++)
        total->out[i] += later->out[i];
}

#endif

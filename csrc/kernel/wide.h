/* Products of a tile whose lanes are query rows, and what is prefetched in their course.
 *
 * Requires prefetch.h and a product; provides multiply_query_key and multiply_value. */
#include "for_editors.h"

#ifndef FA_KERNEL_WIDE_H
#define FA_KERNEL_WIDE_H

#include "prefetch.h"

/* scores[r][m] = scale Σ_d K[first + r][d] Q[m][d], and each lane's largest. Panel rows of keys that may not
 * be read, and those up to the product's height, repeat the nearest key. */
FA_INLINE void multiply_query_key(const fa_problem *p, const tile *t, const key_range *range,
                                  const operand_block *key, const prefetch_plan *plan, real scale,
                                  int vectors, vec *scores, vec block_max[MAX_VECTORS])
{
    for (int m = 0; m < vectors; m++)
        block_max[m] = vec_splat(-(real)INFINITY);
    const int length = (int)((p->head_dim + TILE_K - 1) / TILE_K);
    const int rows = PRODUCT_ROWS(vectors);
    const bool modified = p->mask.data || p->bias.data;
    const int half = (t->rows + 1) / 2, share = share_of_step(half, num_keys(range), rows);
    const block_prefetch keys =
        spread_prefetch(plan->key, &p->key, p->head_dim, plan->key_rows, rows, length);
    const product_rows a = key_rows(range, key);
    for (int r = 0; r < num_keys(range); r += rows) {
        const product_prefetch prefetch = nth_prefetch(&keys, r / rows, length);
        prefetch_queries(p, plan, r, rows);
        if (p->bias.data && t->empty) /* nobody has prefetched it */
            prefetch_score_mods(p, t, range->key_lo, r / rows * 2 * share, 2 * share, t->rows);
        if (modified)
            prefetch_score_mods(p, t, range->key_hi, r / rows * share, share, half);
        product_scores(&a, r, t->query, length, vectors, scale, &prefetch, scores + r * vectors, block_max);
    }
}

/* out[e][m] += Σ_r V[first + r][e] p[r][m] */
FA_INLINE void multiply_value(const fa_problem *p, const tile *t, const key_range *range,
                              const operand_block *value, const packed_vec *probabilities,
                              const prefetch_plan *plan, int vectors, bool nan_safe)
{
    const int length = num_keys(range) / TILE_K;
    const int rows = PRODUCT_ROWS(vectors);
    const block_prefetch values = spread_prefetch(plan->value, &p->value, p->head_dim_v, plan->key_rows,
                                                  share_of_step(plan->key_rows, p->head_dim_v, rows), length);
    const int results = share_of_step(plan->out_rows, p->head_dim_v, rows);
    const bool modified = p->mask.data || p->bias.data;
    const int half = (t->rows + 1) / 2, share = share_of_step(t->rows - half, p->head_dim_v, rows);
    const product_rows a = {value->data + (range->first / TILE_K - value->first) * value->row, value->col,
                            value->row, 0, (int)p->head_dim_v};
    for (int e = 0; e < p->head_dim_v; e += rows) {
        const product_prefetch prefetch = nth_prefetch(&values, e / rows, length);
        prefetch_out(p, t, plan, e / rows, results);
        if (modified)
            prefetch_score_mods(p, t, range->key_hi, half + e / rows * share, share, t->rows);
        product_add(&a, e, probabilities, length, vectors, nan_safe, t->empty, &prefetch,
                    t->out + e * vectors);
    }
}

#endif

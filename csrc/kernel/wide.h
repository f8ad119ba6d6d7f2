/* Products of a tile whose lanes are query rows, and what is prefetched in their course.
 *
 * Requires tile.h and a product; provides multiply_query_key and multiply_value. */
#include "for_editors.h"

#ifndef FA_KERNEL_WIDE_H
#define FA_KERNEL_WIDE_H

#include "tile.h"

/* What a product shares out over its steps, and the rows of this block's bias, and of the next one's bias and
 * mask among it. */
typedef struct {
    shared_streams shared;
    row_stream bias_now, bias, mask;
} wide_streams;

/* Shares out rows [begin, end) of the tile in the mask or the bias, of a block that begins with key n. */
FA_INLINE void share_score_mod(const fa_problem *p, const tile *t, char *const *rows, const fa_array *array,
                               int64_t n, int begin, int end, int share, row_stream *stream,
                               shared_streams *shared)
{
    const int64_t keys = min_i64(t->key_hi - n, KEY_BLOCK), group_size = p->num_heads / p->num_kv_heads;
    if (keys <= 0 || begin >= end)
        return;
    const int64_t head = group_size > 1 ? t->head[begin] % group_size : 0;
    stream_group_rows(stream, rows[begin] - head * array->head + n * array->col, array, keys, head,
                      end - begin, group_size);
    share_stream(shared, stream, share);
}

/* The same of both, where they are there. */
FA_INLINE void share_score_mods(const fa_problem *p, const tile *t, int64_t n, int begin, int end, int share,
                                wide_streams *to)
{
    if (p->bias.data)
        share_score_mod(p, t, t->bias, &p->bias, n, begin, end, share, &to->bias, &to->shared);
    if (p->mask.data)
        share_score_mod(p, t, t->mask, &p->mask, n, begin, end, share, &to->mask, &to->shared);
}

/* Behind the scores' products come the rows of keys and queries, and half of those of mask and bias. */
FA_INLINE void plan_scores_prefetch(const fa_problem *p, const tile *t, const key_range *range,
                                    const next_streams *next, int rows, int length, wide_streams *to,
                                    prefetch_plan *plan)
{
    to->shared.count = 0;
    spread_stream(plan, &next->key, rows, length);
    share_stream(&to->shared, &next->query, rows);
    if (p->mask.data || p->bias.data) {
        const int half = (t->rows + 1) / 2, share = share_of_step(half, num_keys(range), rows);
        if (p->bias.data && t->empty) /* nobody has prefetched it */
            share_score_mod(p, t, t->bias, &p->bias, range->key_lo, 0, t->rows, 2 * share, &to->bias_now,
                            &to->shared);
        share_score_mods(p, t, range->key_hi, 0, half, share, to);
    }
    if (to->shared.count > 0)
        plan->shared = &to->shared;
}

/* Behind those of the values, the rows of values and results, and the other half. */
FA_INLINE void plan_value_prefetch(const fa_problem *p, const tile *t, const key_range *range,
                                   const next_streams *next, int rows, int length, wide_streams *to,
                                   prefetch_plan *plan)
{
    const int columns = (int)p->head_dim_v, half = (t->rows + 1) / 2;
    to->shared.count = 0;
    spread_stream(plan, &next->value, share_of_step(next->value.count, columns, rows), length);
    share_stream(&to->shared, &next->out, share_of_step(next->out.count, columns, rows));
    if (p->mask.data || p->bias.data)
        share_score_mods(p, t, range->key_hi, half, t->rows, share_of_step(t->rows - half, columns, rows),
                         to);
    if (to->shared.count > 0)
        plan->shared = &to->shared;
}

/* scores[r][m] = scale Σ_d K[first + r][d] Q[m][d], and each lane's largest. Panel rows of keys that may not
 * be read, and those up to the product's height, repeat the nearest key. */
FA_INLINE void multiply_query_key(const fa_problem *p, const tile *t, const key_range *range,
                                  const operand_block *key, const next_streams *next, real scale, int vectors,
                                  vec *scores, vec block_max[MAX_VECTORS])
{
    for (int m = 0; m < vectors; m++)
        block_max[m] = vec_splat(-(real)INFINITY);
    const int length = (int)((p->head_dim + TILE_K - 1) / TILE_K);
    const int rows = PRODUCT_ROWS(vectors);
    const product_rows a = key_rows(range, key);
    wide_streams streams;
    prefetch_plan plan;
    plan_scores_prefetch(p, t, range, next, rows, length, &streams, &plan);
    for (int r = 0; r < num_keys(range); r += rows) {
        const product_prefetch lines = prefetch_step(&plan, r / rows);
        product_scores(&a, r, t->query, length, vectors, scale, &lines, scores + r * vectors, block_max);
    }
}

/* out[e][m] += Σ_r V[first + r][e] p[r][m] */
FA_INLINE void multiply_value(const fa_problem *p, const tile *t, const key_range *range,
                              const operand_block *value, const packed_vec *probabilities,
                              const next_streams *next, int vectors, bool nan_safe)
{
    const int length = num_keys(range) / TILE_K;
    const int rows = PRODUCT_ROWS(vectors);
    const product_rows a = {value->data + (range->first / TILE_K - value->first) * value->row, value->col,
                            value->row, 0, (int)p->head_dim_v};
    wide_streams streams;
    prefetch_plan plan;
    plan_value_prefetch(p, t, range, next, rows, length, &streams, &plan);
    for (int e = 0; e < p->head_dim_v; e += rows) {
        const product_prefetch lines = prefetch_step(&plan, e / rows);
        product_add(&a, e, probabilities, length, vectors, nan_safe, t->empty, &lines, t->out + e * vectors);
    }
}

#endif

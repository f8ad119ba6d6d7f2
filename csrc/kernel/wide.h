/* Products of a tile whose lanes are query rows, by the micro-kernel. */
#ifndef FA_KERNEL_WIDE_H
#define FA_KERNEL_WIDE_H

#include "prefetch.h"

/* The micro-kernel needs the CPU in no state of its own. */
FA_INLINE void begin_products(void) {}

FA_INLINE void end_products(void) {}

/* scores[r][m] = scale Σ_d K[first + r][d] Q[m][d], and each lane's largest. Panel rows of keys
 * that may not be read, and those up to the micro-kernel's height, repeat the nearest key. */
FA_INLINE void multiply_query_key(const fa_problem *p, const tile *t, const key_range *range,
                                  const operand_block *key, const prefetch_plan *plan, real scale,
                                  int vectors, vec *scores, vec block_max[MAX_VECTORS])
{
    for (int m = 0; m < vectors; m++)
        block_max[m] = vec_splat(-(real)INFINITY);
    const int length = (int)((p->head_dim + TILE_K - 1) / TILE_K);
    const int rows = MICRO_ROWS(vectors);
    const bool modified = p->mask.data || p->bias.data;
    const int half = (t->rows + 1) / 2, share = share_of_step(half, num_keys(range), rows);
    const block_prefetch keys =
        spread_prefetch(plan->key, &p->key, p->head_dim, plan->key_rows, rows, length);
    for (int r = 0; r < num_keys(range); r += rows) {
        vec c[MAX_MICRO_ROWS][MAX_VECTORS] = {0};
        const char *a[MAX_MICRO_ROWS];
        point_at_keys(range, key, range->first + r, rows, a);
        const product_prefetch prefetch = nth_prefetch(&keys, r / rows, length);
        prefetch_queries(p, plan, r, rows);
        if (p->bias.data && t->empty) /* nobody has asked for it */
            prefetch_score_mods(p, t, range->key_lo, r / rows * 2 * share, 2 * share, t->rows);
        if (modified)
            prefetch_score_mods(p, t, range->key_hi, r / rows * share, share, half);
        product(a, false, key->col, t->query, length, vectors, false, &prefetch, c);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
            for (int m = 0; m < vectors; m++) {
                vec s = scale == 1 ? c[i][m] : c[i][m] * scale;
                scores[(r + i) * vectors + m] = s;
                block_max[m] = vec_max(s, block_max[m]);
            }
    }
}

/* out[e][m] += Σ_r V[first + r][e] p[r][m]. The sum over the block is formed apart and then added: of
 * many keys, rounding errors grow with the blocks and not with the keys. */
FA_INLINE void multiply_value(const fa_problem *p, const tile *t, const key_range *range,
                              const operand_block *value, const packed_vec *probabilities,
                              const prefetch_plan *plan, int vectors, bool nan_safe)
{
    const char *base = value->data + (range->first / TILE_K - value->first) * value->row;
    const int length = num_keys(range) / TILE_K;
    const int rows = MICRO_ROWS(vectors);
    const block_prefetch values = spread_prefetch(plan->value, &p->value, p->head_dim_v, plan->key_rows,
                                                  share_of_step(plan->key_rows, p->head_dim_v, rows), length);
    const int results = share_of_step(plan->out_rows, p->head_dim_v, rows);
    const bool modified = p->mask.data || p->bias.data;
    const int half = (t->rows + 1) / 2, share = share_of_step(t->rows - half, p->head_dim_v, rows);
    for (int e = 0; e < p->head_dim_v; e += rows) {
        vec c[MAX_MICRO_ROWS][MAX_VECTORS] = {0};
        vec *out = t->out + e * vectors;
        const product_prefetch prefetch = nth_prefetch(&values, e / rows, length);
        prefetch_out(p, t, plan, e / rows, results);
        if (modified)
            prefetch_score_mods(p, t, range->key_hi, half + e / rows * share, share, t->rows);
        if (value->col == sizeof(operand) && e + rows <= p->head_dim_v) {
            const char *first = base + e * (int)sizeof(operand);
            product(&first, true, value->row, probabilities, length, vectors, nan_safe, &prefetch, c);
        } else {
            const char *a[MAX_MICRO_ROWS];
            for (int i = 0; i < rows; i++)
                a[i] = base + min_i64(e + i, p->head_dim_v - 1) * value->col;
            product(a, false, value->row, probabilities, length, vectors, nan_safe, &prefetch, c);
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
            for (int m = 0; m < vectors; m++)
                out[i * vectors + m] = t->empty ? c[i][m] : out[i * vectors + m] + c[i][m];
    }
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
            c[i] = multiply_add(a, (packed_vec)c[i], c[i]); /* nothing that could be computed once for all */
    }
    real sum = 0;
    for (int i = 0; i < CHAINS; i++)
        sum += c[i][0];
    volatile real sink = sum;
    (void)sink;
    return (double)rounds * CHAINS * LANES * 2 * TILE_K;
}

#endif

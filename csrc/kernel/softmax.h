/* The running softmax, down the registers: a lane is a query row, so no step is horizontal.
 *
 * Probabilities are p = 2^((s - row_max) to_log2), where row_max may be below the true maximum: it is
 * raised only when a score exceeds it by more than RESCALE_THRESHOLD in units of log2, which is rare after
 * the first block, and then the sums so far are rescaled. The quotient at the end is the same, and p <=
 * 2^RESCALE_THRESHOLD cannot overflow. Each lane decides for itself, so a row does not depend on the others
 * of its tile.
 *
 * The subtraction comes first: it is exact where it matters, however large the scores are.
 *
 * Requires scores.h; provides update_row_max, exponentiate and rescale_out. */
#include "for_editors.h"

#ifndef FA_KERNEL_SOFTMAX_H
#define FA_KERNEL_SOFTMAX_H

#include "scores.h"

#define RESCALE_THRESHOLD 8

/* Raises row_max where the largest scores of a block call for it; true if `rescale` is not 1 in some lane. */
FA_INLINE bool update_row_max(tile *t, vec block_max[MAX_VECTORS], real to_log2, int vectors, bool decode,
                              vec rescale[MAX_VECTORS])
{
    const real max_finite = FA_REAL_BYTES == 4 ? 1e38f : (real)1e308;
    const real threshold = RESCALE_THRESHOLD / to_log2 < max_finite
                               ? RESCALE_THRESHOLD / to_log2
                               : max_finite; /* -inf + threshold must be -inf */
    for (int lanes = LANES / 2; decode && lanes >= t->rows_pow2; lanes /= 2)
        block_max[0] = vec_max(vec_rotate(block_max[0], lanes), block_max[0]);
    bool raised = false;
    for (int m = 0; m < vectors; m++) {
        vmask higher = vec_greater(block_max[m], t->row_max[m] + threshold);
        rescale[m] = vec_splat(1);
        if (!vmask_any(higher))
            continue;
        raised = true;
        rescale[m] = vec_select(higher, vec_exp2((t->row_max[m] - block_max[m]) * to_log2), rescale[m]);
        t->row_max[m] = vec_select(higher, block_max[m], t->row_max[m]);
    }
    return raised;
}

/* row_max as something to subtract: 0 for a row that has seen no key, whose scores are all -inf. */
FA_INLINE vec finite_row_max(const tile *t, int m)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    return vec_select(vec_equal(t->row_max[m], minus_infinity), vec_splat(0), t->row_max[m]);
}

/* scores -> p, whose sum over the block is added to row_sum. mark_masked: p of a masked score is -0.
 *
 * Some fifteen dependent operations make a p, and a CPU looks ahead over few of them; so the exponents of a
 * row of the panel are split while the powers of the row before are formed. */
FA_INLINE void exponentiate(tile *t, vec *scores, int panel_rows, real to_log2, int vectors, bool mark_masked)
{
    vec reference[MAX_VECTORS], sum[MAX_VECTORS];
    exponent next[MAX_VECTORS];
    for (int m = 0; m < vectors; m++) {
        reference[m] = finite_row_max(t, m);
        sum[m] = vec_splat(0);
        next[m] = split_exponent((scores[m] - reference[m]) * to_log2);
    }
    for (int r = 0; r < panel_rows; r++) {
        vec *row = scores + r * vectors, *row_after = r + 1 < panel_rows ? row + vectors : row;
        exponent now[MAX_VECTORS];
#pragma GCC unroll 3
        for (int m = 0; m < vectors; m++) {
            now[m] = next[m];
            next[m] = split_exponent((row_after[m] - reference[m]) * to_log2);
        }
#pragma GCC unroll 3
        for (int m = 0; m < vectors; m++) {
            vec p = vec_exp2_of(now[m]);
            if (mark_masked)
                p = vec_select(vec_equal(row[m], vec_splat(-(real)INFINITY)), vec_splat((real)-0.0), p);
            row[m] = p;
            sum[m] += p;
        }
    }
    for (int m = 0; m < vectors; m++)
        t->row_sum[m] += sum[m];
}

/* out *= factor, which is a row's. */
FA_INLINE void rescale_out(const tile *t, int64_t head_dim_v, int vectors, const vec factor[MAX_VECTORS],
                           vec *out)
{
    if (is_decode(t)) {
        for (int r = 0; r < t->rows_pow2; r++)
            for (int i = 0; i < vectors_of(head_dim_v); i++)
                out[r * vectors_of(head_dim_v) + i] *= factor[0][r];
        return;
    }
    for (int64_t e = 0; e < head_dim_v; e++)
        for (int m = 0; m < vectors; m++)
            out[e * vectors + m] *= factor[m];
}

/* Adds up what the lanes of a decode tile have summed apart, so that each lane has its row's sum. */
static void gather_row_sum(tile *t)
{
    for (int lanes = LANES / 2; is_decode(t) && lanes >= t->rows_pow2; lanes /= 2)
        t->row_sum[0] += vec_rotate(t->row_sum[0], lanes);
}

#endif

/* What this CPU does at most of what a kernel needs, in registers and with nothing else: multiply-adds of
 * decode tiles, and the softmax. The multiply-adds of wide tiles are their product's (measure_peak_rounds).
 *
 * Requires softmax.h and an operand; provides the rounds that csrc/measure.c times. */
#include "for_editors.h"

#ifndef FA_KERNEL_LIMITS_H
#define FA_KERNEL_LIMITS_H

#include "prefetch.h"
#include "softmax.h"

#if IS_PIPELINED
#include "softmax_stream.h"
#endif

/* Sums that are independent of each other: as many as multiply-adds are under way at a time. */
#define DECODE_CHAINS (FA_VECTOR_BYTES == 64 ? 24 : 12)

/* FLOPs of the multiply-adds of decode tiles. */
static double measure_decode_rounds(int64_t rounds)
{
    if (DECODES_IN_TILES)
        return measure_peak_rounds(rounds);
    volatile real source = 0;
    vec c[DECODE_CHAINS];
    const packed_vec k = (packed_vec)vec_splat(source);
    for (int i = 0; i < DECODE_CHAINS; i++)
        c[i] = vec_splat(source);
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 24
        for (int i = 0; i < DECODE_CHAINS; i++)
            c[i] = multiply_lanes(k, (packed_vec)c[i], c[i]);
    }
    real sum = 0;
    for (int i = 0; i < DECODE_CHAINS; i++)
        sum += c[i][0];
    volatile real sink = sum;
    (void)sink;
    return (double)rounds * DECODE_CHAINS * LANES * 2 * (PRODUCTS_IN_BFLOAT16 ? 2 : 1);
}

/* Two vectors of scores -> probabilities, which are summed, and the largest score, as wide tiles do it. */
FA_INLINE void soften_two(const vec *scores, vec reference, vec to_log2, vec *sum, vec *largest)
{
#if IS_PIPELINED && MAX_PARTS > 1 /* without the largest, but in parts and packed for the tile unit */
    const vec p = vec_exp2((scores[0] - reference) * to_log2),
              q = vec_exp2((scores[1] - reference) * to_log2);
    vec low = p, high = q;
    for (int i = 0; i < MAX_PARTS; i++) {
        *largest = (vec)((uvec)*largest | truncate_pairs(low, high));
        low -= (vec)((uvec)low & 0xffff0000);
        high -= (vec)((uvec)high & 0xffff0000);
    }
#elif IS_PIPELINED /* the same, rounded to one part */
    const vec p = vec_exp2_coarse((scores[0] - reference) * to_log2);
    const vec q = vec_exp2_coarse((scores[1] - reference) * to_log2);
    *largest = (vec)((uvec)*largest | round_pairs_fast(p, q));
#else
    const vec p = vec_exp2((scores[0] - reference) * to_log2);
    const vec q = vec_exp2((scores[1] - reference) * to_log2);
    *largest = vec_max(scores[1], vec_max(scores[0], *largest));
#endif
    *sum += p;
    *sum += q;
}

/* Scores. They lie in L1, as they do between the products; there are no masks, and nothing changes them. */
static double measure_softmax_rounds(int64_t rounds)
{
    enum { VECTORS = 32, CHAINS = 4 };
    volatile real source = 0;
    const vec zero = vec_splat(source), one = vec_splat(source + 1);
    vec scores[VECTORS], sum[CHAINS], largest[CHAINS];
    for (int i = 0; i < VECTORS; i++)
        scores[i] = vec_splat(source);
    for (int i = 0; i < CHAINS; i++)
        sum[i] = largest[i] = zero;
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 1
        for (int v = 0; v < VECTORS; v += 2 * CHAINS)
#pragma GCC unroll 4
            for (int i = 0; i < CHAINS; i++)
                soften_two(scores + v + 2 * i, zero, one, &sum[i], &largest[i]);
    }
    real total = 0;
    for (int i = 0; i < CHAINS; i++)
        total += sum[i][0] + largest[i][0];
    volatile real sink = total;
    (void)sink;
    return (double)rounds * VECTORS * LANES;
}

#endif

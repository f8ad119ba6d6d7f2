/* The scale of probabilities on the tile unit, whose pipeline has no pass for the maximum.
 *
 * Requires a product (IS_PIPELINED); provides max_excess_log2, probability_shift and shift_factor. */
#include "for_editors.h"

#ifndef FA_KERNEL_PROBABILITY_SHIFT_H
#define FA_KERNEL_PROBABILITY_SHIFT_H

#include "vec_types.h"

/* How far, in units of log2, scores may exceed their row's reference before that is raised; and by which
 * power of two probabilities, and the output until it is normalised, are smaller, so that values times what
 * exceeds it do not overflow. Probabilities below 2^-52 of a row's largest are then 0, which bfloat16 does
 * not show, but float32 does; and under a sink all of a row's may be as small, or all that dropout leaves. */
FA_INLINE bool keeps_small_probabilities(const fa_problem *p)
{
    return MAX_PARTS > 1 || p->sinks.data || p->dropout > 0;
}

FA_INLINE int max_excess_log2(const fa_problem *p)
{
    return keeps_small_probabilities(p) ? 8 : 60;
}

FA_INLINE int probability_shift(const fa_problem *p)
{
    return IS_PIPELINED && !keeps_small_probabilities(p) ? 74 : 0;
}

/* What the shift is undone by. */
FA_INLINE real shift_factor(const fa_problem *p)
{
    return probability_shift(p) == 0 ? 1 : (real)0x1p74;
}

#endif

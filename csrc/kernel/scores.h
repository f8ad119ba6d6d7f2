/* What the units of scores are. Row r of the score panel is key first + r, or of a decode tile some keys.
 *
 * Requires score_mods.h; provides the unit of scores, and what masks leave of a block. */
#include "for_editors.h"

#ifndef FA_KERNEL_SCORES_H
#define FA_KERNEL_SCORES_H

#include "score_mods.h"

/* Whether something besides other scores meets the scores, so that they must be in natural units: the
 * micro-kernel's epilogue then scales them. Otherwise the scale waits for the exponential, where it is free.
 */
FA_INLINE bool scales_in_epilogue(const fa_problem *p)
{
    return problem_score_mods(p) != 0 || p->sinks.data;
}

#define LOG2E 1.4426950408889634074

/* The scale's sign, which goes into the packed queries; 0 if the scale is 0 to the precision of `real`. */
FA_INLINE int scale_sign(const fa_problem *p)
{
    return (real)(p->scale * LOG2E) == 0 ? 0 : p->scale < 0 ? -1 : 1;
}

/* |scale|, finite in `real`. */
FA_INLINE double scale_magnitude(const fa_problem *p)
{
    const double max_finite = FA_REAL_BYTES == 4 ? 1e38 : 1e308;
    return fmin(fabs(p->scale), max_finite);
}

/* What the scores of the panel are to be multiplied by to be in natural units. At scale 0 the queries are
 * 0, and masked scores must stay -inf. */
FA_INLINE double deferred_scale(const fa_problem *p)
{
    return scales_in_epilogue(p) || scale_sign(p) == 0 ? 1 : scale_magnitude(p);
}

/* False if the mask lets no row see any of the keys. Reads the mask into the tile. */
FA_INLINE bool sees_block(const fa_problem *p, tile *t, const key_range *range, score_mods *mods)
{
    const mask_state seen = p->mask.data ? load_mask(p, t, range) : MASK_FULL;
    *mods = seen == MASK_EMPTY ? 0 : find_score_mods(p, t, range, seen == MASK_PARTIAL);
    return seen != MASK_EMPTY;
}

#endif

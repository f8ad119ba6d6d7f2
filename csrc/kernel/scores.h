/* Scores of a tile against a block of keys, scaled, and what their units are. Row r of the score panel is key
 * first + r, or of a narrow tile some keys. */
#ifndef FA_KERNEL_SCORES_H
#define FA_KERNEL_SCORES_H

#include "modifiers.h"

/* Whether something besides other scores meets the scores, so that they must be in natural units: the
 * micro-kernel's epilogue then scales them. Otherwise the scale waits for the exponential, where it is free.
 */
FA_INLINE bool needs_natural_scores(const fa_problem *p)
{
    return p->softcap != 0 || p->bias.data || p->alibi_slopes.data || p->sinks.data;
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
    const double largest = FA_REAL_BYTES == 4 ? 1e38 : 1e308;
    return fmin(fabs(p->scale), largest);
}

/* What the scores of the panel are to be multiplied by to be in natural units. At scale 0 the queries are
 * 0, and masked scores must stay -inf. */
FA_INLINE double score_unit(const fa_problem *p)
{
    return needs_natural_scores(p) || scale_sign(p) == 0 ? 1 : scale_magnitude(p);
}

/* Fills the panel, and finds each lane's largest score; false if no row sees any of the keys, and the panel
 * is left as it was. */
FA_INLINE bool compute_scores(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                              const lookahead *ahead, int vectors, bool narrow, vec *scores,
                              vec largest[MAX_VECTORS])
{
    visibility seen = p->mask.data ? load_mask(p, t, range) : SEES_ALL;
    if (seen == SEES_NONE)
        return false;
    const modifiers by = find_modifiers(p, t, range, seen == SEES_SOME);
    const bool modified = count_modifiers(by) > 0;
    const real scale = needs_natural_scores(p) ? (real)scale_magnitude(p) : 1;
    if (narrow) {
        multiply_narrow_query_key(p, t, range, key, ahead, scale, scores);
    } else {
        multiply_query_key(p, t, range, key, ahead, scale, vectors, scores, largest);
        hide_rows_behind(t, range, scores);
    }
    if (modified)
        modify_scores(p, t, range, by, scores, largest);
    else if (narrow)
        find_largest(scores, panel_rows(t, range, narrow), vectors, largest);
    return true;
}

#endif

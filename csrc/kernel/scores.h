/* Scores of a tile against a block of keys, and all that changes or hides them.
 *
 * Row r of the score panel is key first + r, or of a narrow tile some keys. Order: scale, softcap, bias,
 * ALiBi, mask, interval. */
#ifndef FA_KERNEL_SCORES_H
#define FA_KERNEL_SCORES_H

#include "math.h"
#include "narrow.h"

/* Rows of the panel, of 2^key_shift keys each; known to be 1 in the copies for wide tiles. */
FA_INLINE int panel_rows(const tile *t, const key_range *range, bool narrow)
{
    return narrow ? num_keys(range) >> t->key_shift : num_keys(range);
}

FA_INLINE int keys_per_row(const tile *t, bool narrow)
{
    return narrow ? 1 << t->key_shift : 1;
}

FA_INLINE void cap(const fa_problem *p, int count, vec *scores)
{
    /* Beyond these the cap does nothing, or leaves nothing, to the precision of `real`. */
    const double lowest = FA_REAL_BYTES == 4 ? 1e-30 : 1e-300;
    const double clamped = fmin(fmax(p->softcap, lowest), 1 / lowest);
    const real softcap = (real)clamped, inverse = (real)(1 / clamped);
    for (int i = 0; i < count; i++)
        scores[i] = softcap * vec_tanh(scores[i], inverse);
}

/* Not NaN + -inf: -inf in a bias masks whatever the key holds. */
FA_INLINE vec biased(vec score, vec bias)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    return vec_select(vec_equal(bias, minus_infinity), minus_infinity, score + bias);
}

static void add_narrow_bias(const fa_problem *p, const tile *t, const key_range *range, vec *scores)
{
    for (int r = 0; r < panel_rows(t, range, true); r++) {
        vec bias = {0};
        for (int j = 0; j < LANES; j++) {
            int64_t n = range->first + (r << t->key_shift) + t->lane_key[j];
            if (n >= range->key_lo && n < range->key_hi)
                bias[j] = load_element(t->bias[j] + n * p->bias.col, p->bias.dtype);
        }
        scores[r] = biased(scores[r], bias);
    }
}

/* Bias lies with keys along its rows; a lane is a query, so LANES × LANES squares are transposed. */
FA_INLINE void add_bias(const fa_problem *p, const tile *t, const key_range *range, int vectors, vec *scores)
{
    for (int64_t n = range->key_lo; n < range->key_hi; n += LANES) {
        int count = (int)min_i64(LANES, range->key_hi - n);
        vec *rows = scores + (n - range->first) * vectors;
        for (int m = 0; m < vectors; m++) {
            vec x[LANES];
            load_square(t->bias + m * LANES, n * p->bias.col, p->bias.col, count, p->bias.dtype, x);
            for (int j = 0; j < count; j++)
                rows[j * vectors + m] = biased(rows[j * vectors + m], x[j]);
        }
    }
}

/* -slope · |position - key| */
FA_INLINE void add_alibi(const tile *t, const key_range *range, int vectors, bool narrow, vec *scores)
{
    for (int m = 0; m < vectors; m++) {
        vec ahead = {0};
        for (int j = 0; j < LANES; j++)
            ahead[j] = (real)(t->position[m * LANES + j] - range->first - t->lane_key[m * LANES + j]);
        for (int r = 0; r < panel_rows(t, range, narrow); r++)
            scores[r * vectors + m] -= t->slope[m] * vec_abs(ahead - (real)(r * keys_per_row(t, narrow)));
    }
}

/* `count` <= 64 booleans `step` bytes apart, as bits. */
#ifndef load_mask_bits
FA_INLINE uint64_t load_mask_bits(const char *mask, ptrdiff_t step, int count)
{
    uint64_t bits = 0;
    if (step == 0)
        return *mask ? ~(uint64_t)0 >> (64 - count) : 0;
    int n = 0;
    if (step == 1 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) {
        for (; n + 8 <= count; n += 8) {
            uint64_t bytes;
            memcpy(&bytes, mask + n, sizeof bytes);
            /* 1 in each byte that is not 0; the product gathers them in the top byte. */
            const uint64_t low_bits = 0x7f7f7f7f7f7f7f7f;
            bytes = (((bytes & low_bits) + low_bits) | bytes) >> 7 & 0x0101010101010101;
            bits |= (bytes * 0x0102040810204080) >> 56 << n;
        }
    }
    for (; n < count; n++)
        bits |= (uint64_t)(mask[n * step] != 0) << n;
    return bits;
}
#endif

typedef enum { SEES_NONE, SEES_SOME, SEES_ALL } visibility;

/* Reads the block's part of the mask into t->mask_words. */
FA_INLINE visibility load_mask(const fa_problem *p, tile *t, const key_range *range, int vectors)
{
    const int count = (int)(range->key_hi - range->key_lo);
    const int lead = (int)(range->key_lo - range->first);
    const uint64_t full = ~(uint64_t)0 >> (64 - count);
    uint64_t any = 0, all = full, bits = 0;
    const char *previous = NULL;
    for (int j = 0; j < vectors * LANES; j++) {
        if (t->mask[j] != previous) {
            bits = load_mask_bits(t->mask[j] + range->key_lo * p->mask.col, p->mask.col, count);
            any |= bits;
            all &= bits;
            previous = t->mask[j];
        }
        for (int word = 0; word < MASK_WORDS; word++)
            t->mask_words[word][j / LANES][j % LANES] =
                (lane)(bits << lead >> t->lane_key[j] >> (word * LANE_BITS % 64));
    }
    return any == 0 ? SEES_NONE : all == full ? SEES_ALL : SEES_SOME;
}

FA_INLINE void apply_mask(const tile *t, const key_range *range, int vectors, bool narrow, vec *scores)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    for (int r = 0; r < panel_rows(t, range, narrow); r++) {
        int key = r * keys_per_row(t, narrow);
        ivec bit = ivec_splat((lane)((uint64_t)1 << key % LANE_BITS));
        for (int m = 0; m < vectors; m++) {
            vmask visible = ivec_test(t->mask_words[key / LANE_BITS][m], bit);
            scores[r * vectors + m] = vec_select(visible, scores[r * vectors + m], minus_infinity);
        }
    }
}

/* Hides the keys outside each row's interval. */
FA_INLINE void apply_intervals(const tile *t, const key_range *range, int vectors, bool narrow, vec *scores)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    vec lo[MAX_VECTORS], hi[MAX_VECTORS]; /* from the lane's first key on; small enough to be exact */
    for (int j = 0; j < vectors * LANES; j++) {
        int64_t first = range->first + t->lane_key[j];
        lo[j / LANES][j % LANES] = (real)min_i64(max_i64(t->lo[j] - first, -LANES), KEY_BLOCK);
        hi[j / LANES][j % LANES] = (real)min_i64(max_i64(t->hi[j] - first, -LANES), KEY_BLOCK);
    }
    for (int r = 0; r < panel_rows(t, range, narrow); r++) {
        vec key = vec_splat((real)(r * keys_per_row(t, narrow)));
        for (int m = 0; m < vectors; m++) {
            vec s = scores[r * vectors + m];
            s = vec_select(vec_greater(hi[m], key), s, minus_infinity);
            scores[r * vectors + m] = vec_select(vec_greater(lo[m], key), minus_infinity, s);
        }
    }
}

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

/* What changes or hides scores that are there; false if nothing did. */
FA_INLINE bool modify_scores(const fa_problem *p, const tile *t, const key_range *range, bool masked,
                             int vectors, bool narrow, vec *scores)
{
    if (p->softcap != 0)
        cap(p, panel_rows(t, range, narrow) * vectors, scores);
    if (p->bias.data && narrow)
        add_narrow_bias(p, t, range, scores);
    else if (p->bias.data)
        add_bias(p, t, range, vectors, scores);
    if (p->alibi_slopes.data)
        add_alibi(t, range, vectors, narrow, scores);
    if (masked)
        apply_mask(t, range, vectors, narrow, scores);
    bool edges = range->first < t->inner_lo || range->last > t->inner_hi;
    if (edges)
        apply_intervals(t, range, vectors, narrow, scores);
    return masked || edges || p->softcap != 0 || p->bias.data || p->alibi_slopes.data;
}

/* Fills the panel, and finds each lane's largest score; false if no row sees any of the keys, and the panel
 * is left as it was. */
FA_INLINE bool compute_scores(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                              const lookahead *ahead, int vectors, bool narrow, vec *scores,
                              vec largest[MAX_VECTORS])
{
    visibility seen = p->mask.data ? load_mask(p, t, range, vectors) : SEES_ALL;
    if (seen == SEES_NONE)
        return false;
    const real scale = needs_natural_scores(p) ? (real)scale_magnitude(p) : 1;
    if (narrow)
        multiply_narrow_query_key(p, t, range, key, ahead, scale, scores);
    else
        multiply_query_key(p, t, range, key, ahead, scale, vectors, scores, largest);
    if (modify_scores(p, t, range, seen == SEES_SOME, vectors, narrow, scores) || narrow)
        find_largest(scores, panel_rows(t, range, narrow), vectors, largest);
    return true;
}

#endif

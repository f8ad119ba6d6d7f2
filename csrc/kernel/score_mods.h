/* All that changes or masks scores, in this order: softcap, bias, ALiBi, mask, interval.
 *
 * One pass over the panel does it all, and finds the largest scores. It goes by blocks of LANES rows,
 * because bias lies with keys along its rows and must be transposed.
 *
 * Requires decode.h and math.h; provides score_mods, load_mask and modify_scores. */
#include "for_editors.h"

#ifndef FA_KERNEL_SCORE_MODS_H
#define FA_KERNEL_SCORE_MODS_H

#include "math.h"
#include "decode.h"

/* What changes or masks the scores of a block, as a set of these, in the order in which it does. */
typedef unsigned score_mods;
enum { MOD_SOFTCAP = 1, MOD_BIAS = 2, MOD_ALIBI = 4, MOD_MASK = 8, MOD_WINDOW = 16 };

/* Those that meet every block. They are of natural units, which scores then come in. */
FA_INLINE score_mods problem_score_mods(const fa_problem *p)
{
    return (p->softcap != 0 ? MOD_SOFTCAP : 0) | (p->bias.data ? MOD_BIAS : 0) |
           (p->alibi_slopes.data ? MOD_ALIBI : 0);
}

static score_mods find_score_mods(const fa_problem *p, const tile *t, const key_range *range, bool mask)
{
    const int64_t last = is_decode(t) ? range->last : range->key_hi;
    const bool window = range->first < t->full_lo || last > t->full_hi;
    return problem_score_mods(p) | (mask ? MOD_MASK : 0) | (window ? MOD_WINDOW : 0);
}

/* What they need to know of the block. */
typedef struct {
    real softcap, inverse_softcap;
    vec alibi_distance[MAX_VECTORS];      /* of the first key in a lane, the lane's position */
    vec lo[MAX_VECTORS], hi[MAX_VECTORS]; /* keys the lane's interval lets it see, from its first key on */
} score_mod_terms;

static void set_softcap(const fa_problem *p, score_mod_terms *terms)
{
    /* Beyond these the cap does nothing, or leaves nothing, to the precision of `real`. */
    const double lowest = FA_REAL_BYTES == 4 ? 1e-30 : 1e-300;
    const double softcap = fmin(fmax(p->softcap, lowest), 1 / lowest);
    terms->softcap = (real)softcap;
    terms->inverse_softcap = (real)(1 / softcap);
}

static void set_alibi_distance(const tile *t, const key_range *range, score_mod_terms *terms)
{
    for (int j = 0; j < t->vectors * LANES; j++)
        terms->alibi_distance[j / LANES][j % LANES] = (real)(t->position[j] - range->first - t->lane_key[j]);
}

/* Small enough to be exact in `real`. */
static void set_intervals(const tile *t, const key_range *range, score_mod_terms *terms)
{
    for (int j = 0; j < t->vectors * LANES; j++) {
        int64_t first = range->first + t->lane_key[j];
        terms->lo[j / LANES][j % LANES] = (real)min_i64(max_i64(t->lo[j] - first, -LANES), DECODE_KEYS);
        terms->hi[j / LANES][j % LANES] = (real)min_i64(max_i64(t->hi[j] - first, -LANES), DECODE_KEYS);
    }
}

/* Of panel row r and vector m, lane by lane: each may have a key of its own, or one that may not be read. */
static vec gather_bias(const fa_problem *p, const tile *t, const key_range *range, int r, int m)
{
    vec bias = {0};
    for (int j = m * LANES; j < (m + 1) * LANES; j++) {
        int64_t n = range->first + (r << t->key_shift) + t->lane_key[j];
        if (n >= range->key_lo && n < range->key_hi)
            bias[j % LANES] = load_element(t->bias[j] + n * p->bias.col, p->bias.dtype);
    }
    return bias;
}

/* Of panel rows [r, r + count) and vector m. */
FA_INLINE void load_bias(const fa_problem *p, const tile *t, const key_range *range, bool decode, int r,
                         int count, int m, vec bias[LANES])
{
    const int64_t n = range->first + r;
    if (!decode && n >= range->key_lo)
        load_transposed(t->bias + m * LANES, n * p->bias.col, p->bias.col, count, p->bias.dtype, bias);
    else
        for (int j = 0; j < count; j++)
            bias[j] = gather_bias(p, t, range, r + j, m);
}

/* Not NaN + -inf: -inf in a bias masks whatever the key holds. */
FA_INLINE vec add_bias(vec score, vec bias)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    return vec_select(vec_equal(bias, minus_infinity), minus_infinity, score + bias);
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

typedef enum { MASK_EMPTY, MASK_PARTIAL, MASK_FULL } mask_state;

/* A row's keys [range->key_lo, range->key_hi), as bits from the first on. */
FA_INLINE uint64_t load_mask_row(const fa_problem *p, const char *mask, const key_range *range)
{
    return load_mask_bits(mask + range->key_lo * p->mask.col, p->mask.col,
                          (int)(range->key_hi - range->key_lo));
}

/* Where some keys are hidden from some lanes: t->mask_words from the bits of each. */
static void spread_mask(tile *t, const uint64_t *bits, int lead)
{
    typedef uint64_t words __attribute__((vector_size(8 * LANES)));
    for (int m = 0; m < t->vectors; m++) {
        words lanes;
        for (int j = 0; j < LANES; j++)
            lanes[j] = bits[m * LANES + j] << lead >> t->lane_key[m * LANES + j];
        for (int word = 0; word < MASK_WORDS; word++)
            t->mask_words[word][m] = __builtin_convertvector(lanes >> (word * LANE_BITS % 64), ivec);
    }
}

/* Reads the block's part of the mask, into t->mask_words where it hides some keys and not all. What lanes
 * share is read once: a row's mask, and one of all rows, as for padding. */
static mask_state load_mask(const fa_problem *p, tile *t, const key_range *range)
{
    const int lanes = t->vectors * LANES;
    const bool shared = p->mask.row == 0 && p->mask.head == 0;
    const int distinct = shared ? 1 : is_decode(t) ? t->rows_pow2 : lanes;
    const uint64_t full = ~(uint64_t)0 >> (64 - (range->key_hi - range->key_lo));
    uint64_t bits[TILE_ROWS], any = 0, all = full;
    for (int j = 0; j < distinct; j++) {
        const bool as_before = j > 0 && t->mask[j] == t->mask[j - 1];
        bits[j] = as_before ? bits[j - 1] : load_mask_row(p, t->mask[j], range);
        any |= bits[j];
        all &= bits[j];
    }
    if (any == 0)
        return MASK_EMPTY;
    if (all == full)
        return MASK_FULL;
    for (int j = distinct; j < lanes; j++)
        bits[j] = bits[j - distinct];
    spread_mask(t, bits, (int)(range->key_lo - range->first));
    return MASK_PARTIAL;
}

/* Where panel row r + j lets the lanes of vector m see its key; a block's bits are in one word. */
FA_INLINE vmask load_mask_lanes(const tile *t, bool decode, int r, int j, int m)
{
    const int first = decode ? (r + j) << t->key_shift : r;
    const uvec word = (uvec)t->mask_words[first / LANE_BITS][m] >> first % LANE_BITS;
    return ivec_test((ivec)word, ivec_splat((lane_int)1 << (decode ? 0 : j)));
}

/* Whether the cap bends none of `count` scores by much: most caps are far above most scores. */
FA_INLINE bool are_near_zero(const vec *scores, int count, int vectors, real factor)
{
    vec farthest = vec_splat(0);
#pragma GCC unroll 16
    for (int j = 0; j < count; j++)
        farthest = vec_max(vec_abs(scores[j * vectors]), farthest);
    return !vmask_any(vec_greater(farthest * factor, vec_splat(TANH_NEAR_ZERO)));
}

/* Panel rows [r, r + count) of vector m, count <= LANES, r a multiple of LANES. Copies of what stays the
 * same: the compiler cannot know that the panel does not overlap it. */
FA_INLINE void modify_lanes(const fa_problem *p, const tile *t, const key_range *range, score_mods mods,
                            bool decode, const score_mod_terms *terms, int r, int count, int m, vec *scores,
                            vec *block_max)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY), slope = t->slope[m],
              alibi_distance = terms->alibi_distance[m];
    const vec lo = terms->lo[m], hi = terms->hi[m];
    const real softcap = terms->softcap, inverse_softcap = terms->inverse_softcap;
    const int vectors = t->vectors, key_shift = decode ? t->key_shift : 0;
    vec bias[LANES], lane_max = *block_max;
    vec *score = scores + r * vectors + m;
    const bool near_zero = (mods & MOD_SOFTCAP) && are_near_zero(score, count, vectors, inverse_softcap);
    if (mods & MOD_BIAS)
        load_bias(p, t, range, decode, r, count, m, bias);
#pragma GCC unroll 16
    for (int j = 0; j < count; j++, score += vectors) {
        const vec key = vec_splat((real)((r + j) << key_shift));
        vec s = *score;
        if (near_zero)
            s = softcap * vec_tanh_near_zero(s * inverse_softcap);
        else if (mods & MOD_SOFTCAP)
            s = softcap * vec_tanh(s * inverse_softcap);
        if (mods & MOD_BIAS)
            s = add_bias(s, bias[j]);
        if (mods & MOD_ALIBI)
            s -= slope * vec_abs(alibi_distance - key);
        if (mods & MOD_MASK)
            s = vec_select(load_mask_lanes(t, decode, r, j, m), s, minus_infinity);
        if (mods & MOD_WINDOW) {
            s = vec_select(vec_greater(hi, key), s, minus_infinity);
            s = vec_select(vec_greater(lo, key), minus_infinity, s);
        }
        *score = s;
        lane_max = vec_max(s, lane_max);
    }
    *block_max = lane_max;
}

/* Behind the last whole vector of panel rows: one copy for all sets of modifiers. */
static void modify_last_lanes(const fa_problem *p, const tile *t, const key_range *range, score_mods mods,
                              bool decode, const score_mod_terms *terms, int r, int count, int m, vec *scores,
                              vec *block_max)
{
    modify_lanes(p, t, range, mods, decode, terms, r, count, m, scores, block_max);
}

/* By vectors, and then along the rows of bias: its lines are shared by blocks that follow each other. */
FA_INLINE void modify_rows(const fa_problem *p, const tile *t, const key_range *range, score_mods mods,
                           bool decode, const score_mod_terms *terms, int rows, vec *scores, vec *block_max)
{
    for (int m = 0; m < t->vectors; m++) {
        block_max[m] = vec_splat(-(real)INFINITY);
        int r = 0;
        for (; r + LANES <= rows; r += LANES)
            modify_lanes(p, t, range, mods, decode, terms, r, LANES, m, scores, block_max + m);
        if (r < rows)
            modify_last_lanes(p, t, range, mods, decode, terms, r, rows - r, m, scores, block_max + m);
    }
}

/* Panel rows behind the last key that may be read, of a wide tile. (Those before the first lie outside every
 * row's interval.) */
static void mask_rows_behind(const tile *t, const key_range *range, vec *scores)
{
    const int end = num_keys(range) * t->vectors;
    for (int i = (int)(range->key_hi - range->first) * t->vectors; i < end; i++)
        scores[i] = vec_splat(-(real)INFINITY);
}

/* Changes and hides scores that are there, and finds each lane's largest. Of wide tiles, the usual single
 * modifiers have copies of their own, where what is not there takes no time. What a copy computes must be the
 * same to the last bit: which one runs depends on other rows. So no copy may round twice where another rounds
 * once. */
static void modify_scores(const fa_problem *p, const tile *t, const key_range *range, score_mods mods,
                          vec *scores, vec block_max[MAX_VECTORS])
{
    score_mod_terms terms = {0};
    const bool decode = is_decode(t);
    const int rows = decode ? panel_rows(t, range, true) : (int)(range->key_hi - range->first);
    if (mods & MOD_SOFTCAP)
        set_softcap(p, &terms);
    if (mods & MOD_ALIBI)
        set_alibi_distance(t, range, &terms);
    if (mods & MOD_WINDOW)
        set_intervals(t, range, &terms);

    if (!decode && mods == MOD_SOFTCAP)
        modify_rows(p, t, range, MOD_SOFTCAP, false, &terms, rows, scores, block_max);
    else if (!decode && mods == MOD_BIAS)
        modify_rows(p, t, range, MOD_BIAS, false, &terms, rows, scores, block_max);
    else if (!decode && mods == MOD_ALIBI)
        modify_rows(p, t, range, MOD_ALIBI, false, &terms, rows, scores, block_max);
    else if (!decode && mods == MOD_MASK)
        modify_rows(p, t, range, MOD_MASK, false, &terms, rows, scores, block_max);
    else if (!decode && mods == MOD_WINDOW)
        modify_rows(p, t, range, MOD_WINDOW, false, &terms, rows, scores, block_max);
    else
        modify_rows(p, t, range, mods, decode, &terms, rows, scores, block_max);
}

#endif

/* Scores of a tile against a block of keys, and all that changes or hides them.
 *
 * Row r of the score panel is key first + r. Order: scale, softcap, bias, ALiBi, mask, interval. */
#ifndef FA_KERNEL_SCORES_H
#define FA_KERNEL_SCORES_H

#include "math.h"
#include "tile.h"

/* Keys [first, last) of the panel, a multiple of REDUCTION apart, of which [key_lo, key_hi) may be
 * read. */
typedef struct {
    int64_t first, last;
    int64_t key_lo, key_hi;
} key_range;

FA_INLINE int num_keys(const key_range *range)
{
    return (int)(range->last - range->first);
}

/* Rows that will be needed soon, asked for while the present ones are worked on: the CPU cannot guess
 * where a row of 256 bytes is followed by another. The requests are spread over the work, keys and queries
 * over the rows of the first product, values and results over those of the second: memory serves few
 * lines at a time, and in one burst the work would wait for them. */
typedef struct {
    const char *key, *value;
    int key_rows;
    const char *query; /* of the kv head's first query head */
    int64_t query_begin;
    int query_rows;
    int out_rows; /* of the tile itself */
} lookahead;

FA_INLINE void prefetch_keys_and_queries(const fa_problem *p, const lookahead *ahead, int begin, int count)
{
    const int64_t group = p->num_heads / p->num_kv_heads;
    for (int r = begin; r < begin + count && r < ahead->key_rows; r++)
        prefetch(ahead->key + r * p->key.row, prefetch_span(p->key.col, p->head_dim));
    for (int r = begin; r < begin + count && r < ahead->query_rows; r++) {
        int64_t flat = ahead->query_begin + r, row = group == 1 ? flat : flat / group;
        prefetch(ahead->query + row * p->query.row + (flat - row * group) * p->query.head,
                 prefetch_span(p->query.col, p->head_dim));
    }
}

/* The share that falls to columns [e, e + count) of the head_dim_v ones. */
FA_INLINE void prefetch_values_and_out(const fa_problem *p, const tile *t, const lookahead *ahead, int e,
                                       int count)
{
    const int columns = (int)p->head_dim_v, end = e + count < columns ? e + count : columns;
    for (int r = e * ahead->key_rows / columns; r < end * ahead->key_rows / columns; r++)
        prefetch(ahead->value + r * p->value.row, prefetch_span(p->value.col, columns));
    for (int j = e * ahead->out_rows / columns; j < end * ahead->out_rows / columns; j++)
        prefetch_for_write(t->out_row[j], prefetch_span(p->out.col, columns));
}

/* scores[r][m] = scale Σ_d K[first + r][d] Q[m][d]. Panel rows of keys that may not be read, and those up to
 * the micro-kernel's height, repeat the nearest key. */
FA_INLINE void multiply_query_key(const fa_problem *p, const tile *t, const key_range *range,
                                  const operand_block *key, const lookahead *ahead, real scale, int vectors,
                                  vec *scores)
{
    const int length = (int)((p->head_dim + REDUCTION - 1) / REDUCTION);
    const int rows = MICRO_ROWS(vectors);
    for (int r = 0; r < num_keys(range); r += rows) {
        vec c[MAX_MICRO_ROWS][MAX_VECTORS] = {0};
        const char *a[MAX_MICRO_ROWS];
        for (int i = 0; i < rows; i++) {
            int64_t n = min_i64(max_i64(range->first + r + i, range->key_lo), range->key_hi - 1);
            a[i] = key->data + (n - key->first) * key->row;
        }
        prefetch_keys_and_queries(p, ahead, r, rows);
        product(a, key->col, t->query, length, vectors, false, c);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
            for (int m = 0; m < vectors; m++)
                scores[(r + i) * vectors + m] = scale == 1 ? c[i][m] : c[i][m] * scale;
    }
}

FA_INLINE void cap(const fa_problem *p, int count, vec *scores)
{
    /* Beyond these the cap does nothing, or leaves nothing, to the precision of `real`. */
    const double lowest = FA_REAL_BYTES == 4 ? 1e-30 : 1e-300;
    const double clamped = fmin(fmax(p->softcap, lowest), 1 / lowest);
    const real softcap = (real)clamped, inverse = (real)(1 / clamped);
    for (int i = 0; i < count; i++)
        scores[i] = softcap * vec_tanh(scores[i] * inverse);
}

/* Bias lies with keys along its rows; a lane is a query, so LANES × LANES squares are transposed. */
FA_INLINE void add_bias(const fa_problem *p, const tile *t, const key_range *range, int vectors, vec *scores)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    for (int j = 0; j < t->rows; j++) /* the next block's: rows are too far apart for the CPU to guess */
        prefetch(t->bias[j] + range->key_hi * p->bias.col, prefetch_span(p->bias.col, KEY_BLOCK));
    for (int64_t n = range->key_lo; n < range->key_hi; n += LANES) {
        int count = (int)min_i64(LANES, range->key_hi - n);
        vec *rows = scores + (n - range->first) * vectors;
        for (int m = 0; m < vectors; m++) {
            vec x[LANES];
            load_square(t->bias + m * LANES, n * p->bias.col, p->bias.col, count, p->bias.dtype, x);
            for (int j = 0; j < count; j++) {
                vec s = rows[j * vectors + m];
                /* not NaN + -inf: -inf in a bias masks whatever the key holds */
                rows[j * vectors + m] = vec_select(vec_equal(x[j], minus_infinity), minus_infinity, s + x[j]);
            }
        }
    }
}

/* -slope · |position - key| */
FA_INLINE void add_alibi(const tile *t, const key_range *range, int vectors, vec *scores)
{
    vec ahead[MAX_VECTORS] = {0};
    for (int m = 0; m < vectors; m++)
        for (int j = 0; j < LANES; j++)
            ahead[m][j] = (real)(t->position[m * LANES + j] - range->first);
    for (int r = 0; r < num_keys(range); r++)
        for (int m = 0; m < vectors; m++)
            scores[r * vectors + m] -= t->slope[m] * vec_abs(ahead[m] - (real)r);
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
            t->mask_words[word][j / LANES][j % LANES] = (lane)(bits << lead >> (word * LANE_BITS % 64));
    }
    return any == 0 ? SEES_NONE : all == full ? SEES_ALL : SEES_SOME;
}

FA_INLINE void apply_mask(const tile *t, const key_range *range, int vectors, vec *scores)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    for (int r = 0; r < num_keys(range); r++) {
        ivec bit = ivec_splat((lane)((uint64_t)1 << r % LANE_BITS));
        for (int m = 0; m < vectors; m++) {
            vmask visible = ivec_test(t->mask_words[r / LANE_BITS][m], bit);
            scores[r * vectors + m] = vec_select(visible, scores[r * vectors + m], minus_infinity);
        }
    }
}

/* Hides the keys outside each row's interval. */
FA_INLINE void apply_intervals(const tile *t, const key_range *range, int vectors, vec *scores)
{
    const vec minus_infinity = vec_splat(-(real)INFINITY);
    vec lo[MAX_VECTORS], hi[MAX_VECTORS]; /* panel rows, small enough to be exact */
    for (int j = 0; j < vectors * LANES; j++) {
        lo[j / LANES][j % LANES] = (real)min_i64(max_i64(t->lo[j] - range->first, 0), KEY_BLOCK);
        hi[j / LANES][j % LANES] = (real)min_i64(max_i64(t->hi[j] - range->first, 0), KEY_BLOCK);
    }
    for (int r = 0; r < num_keys(range); r++) {
        vec key = vec_splat((real)r);
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

/* Fills the panel; false if no row sees any of the keys, and the panel is left as it was. */
FA_INLINE bool compute_scores(const fa_problem *p, tile *t, const key_range *range, const operand_block *key,
                              const lookahead *ahead, int vectors, vec *scores)
{
    visibility seen = p->mask.data ? load_mask(p, t, range, vectors) : SEES_ALL;
    if (seen == SEES_NONE)
        return false;
    const real scale = needs_natural_scores(p) ? (real)scale_magnitude(p) : 1;
    multiply_query_key(p, t, range, key, ahead, scale, vectors, scores);
    if (p->softcap != 0)
        cap(p, num_keys(range) * vectors, scores);
    if (p->bias.data)
        add_bias(p, t, range, vectors, scores);
    if (p->alibi_slopes.data)
        add_alibi(t, range, vectors, scores);
    if (seen == SEES_SOME)
        apply_mask(t, range, vectors, scores);
    bool edges = range->first < t->inner_lo || range->last > t->inner_hi;
    if (edges)
        apply_intervals(t, range, vectors, scores);
    return true;
}

#endif

/* The softmax of a block of scores in pieces, which run beside the products of the tile unit: exponentials,
 * their sums, and the packing of probabilities to pairs, two rows of the score panel at a time.
 *
 * Requires the tile unit's instruction set (isa/amx.h) and an operand; provides softmax_stream. */
#include "for_editors_amx.h"

#ifndef FA_KERNEL_SOFTMAX_STREAM_H
#define FA_KERNEL_SOFTMAX_STREAM_H

#include "math.h"
#include "product.h"

/* Vectors from a part of the probabilities to the next. */
#define PROBABILITY_PART (FA_KEY_BLOCK / 2 * MAX_VECTORS)

typedef struct {
    const vec *scores;         /* the next two rows */
    packed_vec *probabilities; /* of theirs */
    int rows;                  /* left to do */
    int parts;                 /* of probabilities */
    vec row_max[MAX_VECTORS], sum[MAX_VECTORS], exact_sum[MAX_VECTORS];
    vec to_log2;
    vec coarse[COARSE_TERMS]; /* coefficients, 2^-shift times as large: so are probabilities, and their sum */
    int credit, income, cost; /* a product earns half as much as there are rows; two rows cost as much as
                               * there are products */
} softmax_stream;

/* How much of the softmax follows each product. */
typedef enum {
    PACE_NONE,
    PACE_VECTOR, /* two rows of one vector: of the first and the second in turn */
    PACE_ROWS,   /* two rows */
    PACE_CREDIT  /* as the credit allows */
} softmax_pace;

/* Of scores of vector m, the probabilities for one part, which are added to the sum before they are rounded.
 * exact_sums: for lse, they are summed to float32's precision, too; what is divided by remains the sum of the
 * same exponentials as meet the values. */
FA_INLINE vec soften_scores(softmax_stream *f, bool exact_sums, int m, vec scores)
{
    const vec x = (scores - f->row_max[m]) * f->to_log2, r = vec_fraction(x), *c = f->coarse;
    const vec p = vec_scale_by_floor(((c[3] * r + c[2]) * r + c[1]) * r + c[0], x);
    if (exact_sums)
        f->exact_sum[m] += vec_scale_by_floor(vec_exp2_of_fraction(r), x);
    f->sum[m] += p;
    return p;
}

/* Two rows of vector m. */
FA_INLINE void soften_coarsely(softmax_stream *f, bool exact_sums, int m)
{
    const vec p = soften_scores(f, exact_sums, m, f->scores[m]);
    const vec q = soften_scores(f, exact_sums, m, f->scores[MAX_VECTORS + m]);
    f->probabilities[m] = (packed_vec)round_pairs_fast(p, q);
}

/* Two rows of vector m to float32's precision, in parts. */
FA_INLINE void soften_in_parts(softmax_stream *f, int m)
{
    vec p = vec_exp2((f->scores[m] - f->row_max[m]) * f->to_log2),
        q = vec_exp2((f->scores[MAX_VECTORS + m] - f->row_max[m]) * f->to_log2);
    f->sum[m] += p;
    f->sum[m] += q;
#pragma GCC unroll 3
    for (int i = 0; i < MAX_PARTS; i++) {
        f->probabilities[i * PROBABILITY_PART + m] = (packed_vec)truncate_pairs(p, q);
        if (i + 1 == f->parts)
            break;
        p -= (vec)((uvec)p & 0xffff0000);
        q -= (vec)((uvec)q & 0xffff0000);
    }
}

FA_INLINE void soften_vector(softmax_stream *f, bool exact_sums, int m)
{
    if (MAX_PARTS == 1)
        soften_coarsely(f, exact_sums, m);
    else
        soften_in_parts(f, m);
    if (m + 1 == MAX_VECTORS) {
        f->scores += 2 * MAX_VECTORS;
        f->probabilities += MAX_VECTORS;
        f->rows -= 2;
    }
}

FA_INLINE void soften_rows(softmax_stream *f, bool exact_sums)
{
#pragma GCC unroll 2
    for (int m = 0; m < MAX_VECTORS; m++)
        soften_vector(f, exact_sums, m);
}

/* What `products` products have earned. */
FA_INLINE void soften_by_credit(softmax_stream *f, bool exact_sums, int products)
{
    for (f->credit += products * f->income; f->credit >= f->cost && f->rows > 0; f->credit -= f->cost)
        soften_rows(f, exact_sums);
}

/* What follows product i. */
FA_INLINE void soften_beside(softmax_stream *f, bool exact_sums, softmax_pace pace, int i)
{
    if (pace == PACE_VECTOR)
        soften_vector(f, exact_sums, i % MAX_VECTORS);
    if (pace == PACE_ROWS)
        soften_rows(f, exact_sums);
    if (pace == PACE_CREDIT)
        soften_by_credit(f, exact_sums, 1);
}

/* All but the last `rows` rows. */
FA_INLINE void soften_down_to(softmax_stream *f, bool exact_sums, int rows)
{
    while (f->rows > rows)
        soften_rows(f, exact_sums);
}

#endif

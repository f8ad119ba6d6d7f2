/* Vectors of `real`, and the few operations on them that the language lacks.
 *
 * Included after the instruction set's file, which overrides an operation by defining it first, with
 * `#define NAME NAME`; every operation here is the portable version of one.
 *
 * Requires vec_types.h and the instruction set's overrides; provides every vector operation. */
#include "for_editors.h"

#ifndef FA_KERNEL_VEC_H
#define FA_KERNEL_VEC_H

/* All ones where x is not 0. Without a comparison: SSE2 has none for 64-bit integers. */
FA_INLINE ivec ivec_nonzero(ivec x)
{
    uvec u = (uvec)x;
    return (ivec)(u | -u) >> (LANE_BITS - 1);
}

/* A predicate over lanes; a vector of 0 and -1 unless the instruction set has its own. */
#ifndef vmask
#define vmask ivec

FA_INLINE vmask vec_greater(vec a, vec b)
{
    return a > b;
}

FA_INLINE vmask vec_equal(vec a, vec b)
{
    return a == b;
}

FA_INLINE vmask ivec_test(ivec a, ivec b)
{
    return ivec_nonzero(a & b);
}
#endif

#ifndef vec_select
FA_INLINE vec vec_select(vmask where, vec yes, vec no)
{
    return (vec)((where & (ivec)yes) | (~where & (ivec)no));
}

FA_INLINE bool vmask_any(vmask where)
{
    lane_int any = 0;
    for (int i = 0; i < LANES; i++)
        any |= where[i];
    return any != 0;
}
#endif

/* x, loaded once: GCC holds loads for cheap, and would give each use one of its own. */
FA_INLINE vec vec_in_register(vec x)
{
#ifdef __x86_64__
    __asm__("" : "+v"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

/* The larger of two; b where either is NaN. */
#ifndef vec_max
FA_INLINE vec vec_max(vec a, vec b)
{
    return vec_select(vec_greater(a, b), a, b);
}
#endif

/* x · 2^n for integral n below 128 (1024); 0 where n < LOWEST_EXPONENT, even for x = NaN, so that exp2(-inf)
 * is 0. */
#ifndef vec_scale_exponent
FA_INLINE vec vec_scale_exponent(vec x, vec n)
{
    const real lowest = LOWEST_EXPONENT;
    const real bias = FA_REAL_BYTES == 4 ? 127 : 1023;
    const real magic = FA_REAL_BYTES == 4 ? 0x1.8p23 : 0x1.8p52; /* n + magic ends in n's bits */
    const int mantissa_bits = FA_REAL_BYTES == 4 ? 23 : 52;
    vec power = (vec)((uvec)(n + (magic + bias)) << mantissa_bits);
    return vec_select(vec_greater(vec_splat(lowest), n), vec_splat(0), x * power);
}
#endif

/* The nearest integer for |x| < 2^22 (2^51); beyond, any number at least that large, of x's sign. */
#ifndef vec_round
FA_INLINE vec vec_round(vec x)
{
    const real magic = FA_REAL_BYTES == 4 ? 0x1.8p23 : 0x1.8p52;
    return x + magic - magic;
}
#endif

FA_INLINE vec vec_abs(vec x)
{
    const ivec sign = (ivec)vec_splat((real)-0.0);
    return (vec)((ivec)x & ~sign);
}

/* y with x's sign; y must not be negative. */
FA_INLINE vec vec_copysign(vec y, vec x)
{
    const ivec sign = (ivec)vec_splat((real)-0.0);
    return (vec)((ivec)y | ((ivec)x & sign));
}

/* Shuffles of two vectors a and b of n lanes, or of one: which lane comes to lane i, of a's (0 to n - 1) and
 * b's (n to 2n - 1). INTERLEAVE: a's and b's in turn, from their lower and from their upper halves, or in
 * groups of g. EVEN, ODD: every other one, or every other group of g. STEP_TWO: every other one of a and what
 * follows it, if b begins with a's last lane. */
#define INTERLEAVE_LOW(i, n) ((i) / 2 + (i) % 2 * (n))
#define INTERLEAVE_HIGH(i, n) ((n) / 2 + (i) / 2 + (i) % 2 * (n))
#define EVEN(i, n) (2 * (i))
#define ODD(i, n) (2 * (i) + 1)
#define STEP_TWO(i, n) (2 * (i) + (2 * (i) >= (n)))
#define REVERSED(i, n) ((n) - 1 - (i))
#define EVEN_GROUP(i, n, g) (((i) / (g) * 2 * (g) + (i) % (g)) % (2 * (n)))
#define ODD_GROUP(i, n, g) (((i) / (g) * 2 * (g) + (g) + (i) % (g)) % (2 * (n)))
#define EVEN_TWOS(i, n) EVEN_GROUP(i, n, 2)
#define ODD_TWOS(i, n) ODD_GROUP(i, n, 2)
#define EVEN_FOURS(i, n) EVEN_GROUP(i, n, 4)
#define ODD_FOURS(i, n) ODD_GROUP(i, n, 4)
#define EVEN_EIGHTS(i, n) EVEN_GROUP(i, n, 8)
#define ODD_EIGHTS(i, n) ODD_GROUP(i, n, 8)

#define INTERLEAVE_GROUP(i, n, g) ((i) / (2 * (g)) * (g) + (i) % (g) + (i) / (g) % 2 * (n))
#define INTERLEAVE_FOURS_LOW(i, n) INTERLEAVE_GROUP(i, n, 4)
#define INTERLEAVE_FOURS_HIGH(i, n) ((n) / 2 + INTERLEAVE_GROUP(i, n, 4))

#define LANES_OF_2(lane, n, i) lane(i, n), lane((i) + 1, n)
#define LANES_OF_4(lane, n, i) LANES_OF_2(lane, n, i), LANES_OF_2(lane, n, (i) + 2)
#define LANES_OF_8(lane, n, i) LANES_OF_4(lane, n, i), LANES_OF_4(lane, n, (i) + 4)
#define LANES_OF_16(lane, n, i) LANES_OF_8(lane, n, i), LANES_OF_8(lane, n, (i) + 8)
#define LANES_OF_32(lane, n, i) LANES_OF_16(lane, n, i), LANES_OF_16(lane, n, (i) + 16)

/* Of vectors of `real`, and of vectors of twice as many halves. */
#if LANES == 16
#define SHUFFLE(a, b, lane) __builtin_shufflevector(a, b, LANES_OF_16(lane, 16, 0))
#define SHUFFLE_HALVES(a, b, lane) __builtin_shufflevector(a, b, LANES_OF_32(lane, 32, 0))
#elif LANES == 8
#define SHUFFLE(a, b, lane) __builtin_shufflevector(a, b, LANES_OF_8(lane, 8, 0))
#define SHUFFLE_HALVES(a, b, lane) __builtin_shufflevector(a, b, LANES_OF_16(lane, 16, 0))
#elif LANES == 4
#define SHUFFLE(a, b, lane) __builtin_shufflevector(a, b, LANES_OF_4(lane, 4, 0))
#define SHUFFLE_HALVES(a, b, lane) __builtin_shufflevector(a, b, LANES_OF_8(lane, 8, 0))
#else
#define SHUFFLE(a, b, lane) __builtin_shufflevector(a, b, LANES_OF_2(lane, 2, 0))
#endif

#ifndef vec_sums
/* Sums of a's lanes i and i + LANES / 2, and of b's, in turn. */
FA_INLINE vec vec_fold(vec a, vec b)
{
    return SHUFFLE(a, b, INTERLEAVE_LOW) + SHUFFLE(a, b, INTERLEAVE_HIGH);
}

/* Lane i of the result is the sum of x[i]'s lanes. */
FA_INLINE vec vec_sums(const vec x[LANES])
{
    vec y[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++)
        y[i] = vec_fold(x[i], x[i + LANES / 2]);
#pragma GCC unroll 4
    for (int i = 0; i < LANES / 4; i++)
        y[i] = vec_fold(y[i], y[i + LANES / 4]);
#pragma GCC unroll 2
    for (int i = 0; i < LANES / 8; i++)
        y[i] = vec_fold(y[i], y[i + LANES / 8]);
    return LANES >= 16 ? vec_fold(y[0], y[1]) : y[0];
}
#endif

/* Lane i of the result is lane i + count of x, past the last one again from the first. */
FA_INLINE vec vec_rotate(vec x, int count)
{
    real twice[2 * LANES];
    vec_store(twice, x);
    vec_store(twice + LANES, x);
    return vec_load(twice + count);
}

/* Transposes LANES vectors in place: log2(LANES) perfect shuffles of the whole matrix. */
#ifndef vec_transpose
FA_INLINE void vec_transpose(vec x[LANES])
{
#pragma GCC unroll 4
    for (int stride = 1; stride < LANES; stride *= 2) {
        vec y[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = SHUFFLE(x[i], x[i + LANES / 2], INTERLEAVE_LOW);
            y[2 * i + 1] = SHUFFLE(x[i], x[i + LANES / 2], INTERLEAVE_HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            x[i] = y[i];
    }
}
#endif

#endif

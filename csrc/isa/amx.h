/* The tile unit (AMX) beside AVX512-BF16: 16 × 16 sums of 32 bfloat16 products an instruction, in 16 cycles.
 * Tiles are of 2 vectors of query rows.
 *
 * Beside a tile product, multiply-adds, conversions, reductions and scalings go through one port, one a
 * cycle; additions, logic and blends through another. */
#ifndef FA_ISA_AMX_H
#define FA_ISA_AMX_H

#define MAX_VECTORS 2
#define MIN_VECTORS 2

#include "avx512bf16.h"

FA_INLINE ivec ivec_max(ivec a, ivec b)
{
    return (ivec)_mm512_max_epi32((__m512i)a, (__m512i)b);
}

/* What x exceeds an integer by, in [0, 1): 2^x is 2^r of it, scaled by floor x. 0 of an infinite x. */
FA_INLINE vec vec_fraction(vec x)
{
    return (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

/* q · 2^floor x: 0 for x = -inf, and NaN for a NaN, whatever q > 0 is. */
FA_INLINE vec vec_scale_by_floor(vec q, vec x)
{
    return (vec)_mm512_scalef_ps((__m512)q, (__m512)x);
}

/* 2^r on [0, 1) to 1.4e-7 of it, which float32 shows no more than its own rounding: of degree 5, minimax but
 * for 2^0, which is exact. */
FA_INLINE vec vec_exp2_of_fraction(vec r)
{
    vec q = r * 0x1.e974fap-10f + 0x1.277856p-7f;
    q = q * r + 0x1.c91ce6p-5f;
    q = q * r + 0x1.ebdb56p-3f;
    q = q * r + 0x1.62e4bap-1f;
    return q * r + 1;
}

/* Of 2^r on [0, 1) to 8.6e-5 of it, likewise: enough for what is then rounded to 8 bits. */
#define COARSE_TERMS 4
static const real coarse_coefficients[COARSE_TERMS] = {1, 0.695116783f, 0.227644985f, 0.0770670526f};

/* 2^x to as much, in 6 operations. 0 for x = -inf. */
FA_INLINE vec vec_exp2_coarse(vec x)
{
    const real *c = coarse_coefficients;
    const vec r = vec_fraction(x);
    return vec_scale_by_floor(((c[3] * r + c[2]) * r + c[1]) * r + c[0], x);
}

/* Halves of a and b in turn, within each quarter of a vector: of its lower and of its upper four. */
FA_INLINE vec interleave_quarters_low(vec a, vec b)
{
    return (vec)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
}

FA_INLINE vec interleave_quarters_high(vec a, vec b)
{
    return (vec)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}

/* Lanes (low, high) of the upper halves, by one masked shuffle of bytes. */
FA_INLINE uvec truncate_pairs(vec low, vec high)
{
    const __m512i upper_halves =
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 0, 0, 6, 7, 0, 0, 10, 11, 0, 0, 14, 15, 0, 0));
    return (uvec)_mm512_mask_shuffle_epi8((__m512i)high, 0x3333333333333333, (__m512i)low, upper_halves);
}

/* Lanes (low, high) of numbers that are not negative, rounded to bfloat16: by additions, which leave the
 * multiply-adds' port alone, and the shuffle. */
FA_INLINE uvec round_pairs_fast(vec low, vec high)
{
    const uvec half = (uvec)ivec_splat(0x8000);
    return truncate_pairs((vec)((uvec)low + half), (vec)((uvec)high + half));
}

#endif

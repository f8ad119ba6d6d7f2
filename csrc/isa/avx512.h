/* AVX-512 (F, BW, DQ, VL): 32 registers of 64 bytes.
 *
 * Registers of the micro-kernel at 8 × 3: 24 accumulators + 3 panel vectors + 1 broadcast = 28/32.
 * On the CPUs at hand maximum, rounding, comparison and scaling run beside the multiply-adds. */
#ifndef FA_KERNEL_ELEMENT_H /* in an editor */
#include "../kernel/element_float32.h"
#endif

#ifndef FA_ISA_AVX512_H
#define FA_ISA_AVX512_H

#include <immintrin.h>

#define FA_VECTOR_BYTES 64
#define MICRO_ROWS(vectors) 8

#ifndef MAX_VECTORS /* of query rows in a tile */
#define MAX_VECTORS 3
#define MIN_VECTORS 1
#endif

#include "../kernel/vec_types.h"

#if FA_REAL_BYTES == 4
#define vmask __mmask16

FA_INLINE vmask vec_greater(vec a, vec b)
{
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
}

FA_INLINE vmask vec_equal(vec a, vec b)
{
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
}

FA_INLINE vmask ivec_test(ivec a, ivec b)
{
    return _mm512_test_epi32_mask((__m512i)a, (__m512i)b);
}

FA_INLINE vec vec_select(vmask where, vec yes, vec no)
{
    return (vec)_mm512_mask_blend_ps(where, (__m512)no, (__m512)yes);
}

FA_INLINE vec vec_max(vec a, vec b)
{
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
}

FA_INLINE vec vec_round(vec x)
{
    return (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* 0 below 2^LOWEST_EXPONENT by the float mode. */
FA_INLINE vec vec_scale_exponent(vec x, vec n)
{
    return (vec)_mm512_scalef_ps((__m512)x, (__m512)n);
}

/* 16 halves at src, as lanes: GCC would convert them eight at a time. */
FA_INLINE uvec uvec_load_halves(const void *src)
{
    return (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(src));
}

/* 16 float16 at src. */
FA_INLINE vec vec_load_float16(const void *src)
{
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(src));
}

FA_INLINE vec vec_load_int8(const void *src)
{
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(src)));
}

FA_INLINE void vec_store_float16(void *dst, vec x)
{
    _mm256_storeu_si256(dst, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

FA_INLINE __m512 add_even_to_odd_quarters(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Lane i of the result is the sum of x[i]'s lanes. Within quarters of a vector first, which has the most
 * ports: lanes 4j to 4j + 3 of y[i] are the sums of quarter j of x[4i] to x[4i + 3]. */
FA_INLINE vec vec_sums(const vec x[16])
{
    __m512 y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 a = (__m512)x[4 * i], b = (__m512)x[4 * i + 1];
        __m512 c = (__m512)x[4 * i + 2], d = (__m512)x[4 * i + 3];
        __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        y[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
    }
    return (vec)add_even_to_odd_quarters(add_even_to_odd_quarters(y[0], y[1]),
                                         add_even_to_odd_quarters(y[2], y[3]));
}

#define vec_sums vec_sums

/* Transposes 16 vectors in place. Within quarters of a vector first, 4 × 4, which has the most ports. */
FA_INLINE void vec_transpose(vec x[16])
{
    __m512 y[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        __m512 a = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
        __m512 b = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
        __m512 c = _mm512_unpacklo_ps((__m512)x[i + 2], (__m512)x[i + 3]);
        __m512 d = _mm512_unpackhi_ps((__m512)x[i + 2], (__m512)x[i + 3]);
        y[i] = (__m512)_mm512_unpacklo_pd((__m512d)a, (__m512d)c);
        y[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)a, (__m512d)c);
        y[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)b, (__m512d)d);
        y[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)b, (__m512d)d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 a = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd);
        __m512 c = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x88);
        __m512 d = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xdd);
        x[i] = (vec)_mm512_shuffle_f32x4(a, c, 0x88);
        x[i + 4] = (vec)_mm512_shuffle_f32x4(b, d, 0x88);
        x[i + 8] = (vec)_mm512_shuffle_f32x4(a, c, 0xdd);
        x[i + 12] = (vec)_mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

#define vec_transpose vec_transpose

#else
#define vmask __mmask8

FA_INLINE vmask vec_greater(vec a, vec b)
{
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
}

FA_INLINE vmask vec_equal(vec a, vec b)
{
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
}

FA_INLINE vmask ivec_test(ivec a, ivec b)
{
    return _mm512_test_epi64_mask((__m512i)a, (__m512i)b);
}

FA_INLINE vec vec_select(vmask where, vec yes, vec no)
{
    return (vec)_mm512_mask_blend_pd(where, (__m512d)no, (__m512d)yes);
}

FA_INLINE vec vec_max(vec a, vec b)
{
    return (vec)_mm512_max_pd((__m512d)a, (__m512d)b);
}

FA_INLINE vec vec_round(vec x)
{
    return (vec)_mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FA_INLINE vec vec_scale_exponent(vec x, vec n)
{
    const __m512d lowest = _mm512_set1_pd(LOWEST_EXPONENT);
    const __mmask8 kept = _mm512_cmp_pd_mask((__m512d)n, lowest, _CMP_NLT_UQ); /* NaN is */
    return (vec)_mm512_maskz_scalef_pd(kept, (__m512d)x, (__m512d)n);
}
#endif

/* Of the lower halves of 64 bits. */
#define multiply_words(a, b) ((word_vec)_mm512_mul_epu32((__m512i)(a), _mm512_set1_epi32((int)(b))))

FA_INLINE bool vmask_any(vmask where)
{
    return where != 0;
}

/* `count` <= 64 booleans `step` bytes apart, as bits. */
FA_INLINE uint64_t load_mask_bits(const char *mask, ptrdiff_t step, int count)
{
    const uint64_t wanted = ~(uint64_t)0 >> (64 - count);
    if (step == 0)
        return *mask ? wanted : 0;
    if (step == 1) {
        __m512i bytes = _mm512_maskz_loadu_epi8(wanted, mask);
        return _mm512_test_epi8_mask(bytes, bytes);
    }
    uint64_t bits = 0;
    for (int n = 0; n < count; n++)
        bits |= (uint64_t)(mask[n * step] != 0) << n;
    return bits;
}

#define load_mask_bits load_mask_bits
#define vec_select vec_select
#define vec_max vec_max
#define vec_round vec_round
#define vec_scale_exponent vec_scale_exponent
#define uvec_load_halves uvec_load_halves
#define vec_load_float16 vec_load_float16
#define vec_load_int8 vec_load_int8

#endif

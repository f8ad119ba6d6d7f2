/* AVX2, FMA and F16C: 16 registers of 32 bytes.
 *
 * Registers of the micro-kernel at 4 × 3: 12 accumulators + 3 panel vectors + 1 broadcast = 16/16. */
#ifndef FA_KERNEL_ELEMENT_H /* in an editor */
#include "../kernel/element_float32.h"
#endif

#ifndef FA_ISA_AVX2_H
#define FA_ISA_AVX2_H

#include <immintrin.h>

#define FA_VECTOR_BYTES 32
#define MAX_VECTORS 3
#define MIN_VECTORS 1
#define MICRO_ROWS(vectors) ((vectors) == 3 ? 4 : (vectors) == 2 ? 6 : 8)

#include "../kernel/vec_types.h"

#if FA_REAL_BYTES == 4
FA_INLINE vec vec_select(ivec where, vec yes, vec no)
{
    return (vec)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)where);
}

FA_INLINE bool vmask_any(ivec where)
{
    return _mm256_movemask_ps((__m256)where) != 0;
}

FA_INLINE vec vec_max(vec a, vec b)
{
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
}

FA_INLINE vec vec_round(vec x)
{
    return (vec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* 8 float16 at src. */
FA_INLINE vec vec_load_float16(const void *src)
{
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128(src));
}

FA_INLINE vec vec_load_int8(const void *src)
{
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(src)));
}

FA_INLINE void vec_store_float16(void *dst, vec x)
{
    _mm_storeu_si128(dst, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}

#define vec_load_float16 vec_load_float16
#define vec_load_int8 vec_load_int8
#else
FA_INLINE vec vec_select(ivec where, vec yes, vec no)
{
    return (vec)_mm256_blendv_pd((__m256d)no, (__m256d)yes, (__m256d)where);
}

FA_INLINE bool vmask_any(ivec where)
{
    return _mm256_movemask_pd((__m256d)where) != 0;
}

FA_INLINE vec vec_max(vec a, vec b)
{
    return (vec)_mm256_max_pd((__m256d)a, (__m256d)b);
}

FA_INLINE vec vec_round(vec x)
{
    return (vec)_mm256_round_pd((__m256d)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#endif

/* Of the lower halves of 64 bits. */
#define multiply_words(a, b) ((word_vec)_mm256_mul_epu32((__m256i)(a), _mm256_set1_epi32((int)(b))))

#define vec_select vec_select
#define vec_max vec_max
#define vec_round vec_round

#endif

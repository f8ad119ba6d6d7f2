/* AVX512-BF16 on top of AVX-512: two bfloat16 products a lane and instruction, summed in float32. */
#ifndef FA_ISA_AVX512BF16_H
#define FA_ISA_AVX512BF16_H

#include <string.h>

#include "avx512.h"

/* As the products, it takes subnormal numbers as 0. */
FA_INLINE void vec_store_bfloat16(void *dst, vec x)
{
    __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
    memcpy(dst, &halves, sizeof halves);
}

#define vec_store_bfloat16 vec_store_bfloat16

#include "../kernel/elements.h"

FA_INLINE vec dot_pairs(uvec a, uvec b, vec c)
{
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}

/* bfloat16 of low's lanes, then of high's. */
FA_INLINE vec round_in_order(vec low, vec high)
{
    return (vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

/* Lanes (bfloat16(low), bfloat16(high)). */
FA_INLINE uvec round_pairs(vec low, vec high)
{
    typedef uint16_t halves __attribute__((vector_size(64)));
    halves x = (halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (uvec)__builtin_shufflevector(x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                         9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

#endif

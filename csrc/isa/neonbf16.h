/* BF16 on top of NEON: BFDOT, two bfloat16 products a lane and instruction, summed in float32.
 *
 * Registers of the micro-kernel as in neon.h: BFDOT takes its pair by element, too. BFMMLA has twice the
 * products, but of tiles of 2 × 4 by 4 × 2 elements, for which rows of keys would have to be packed. */
#ifndef FA_ISA_NEONBF16_H
#define FA_ISA_NEONBF16_H

#include "neon.h"

/* Written out, as GCC has these instructions for armv8.2-a and later alone, which zig is not told by the same
 * flag, and as compilers would first move the pair of dot_operand, which they take for an integer, to a
 * vector of its own. */
typedef uint16_t half_words __attribute__((vector_size(16)));

/* bfloat16 of x's lanes, then 0. */
FA_INLINE half_words convert_to_bfloat16(vec x)
{
    half_words halves;
    __asm__("bfcvtn %0.4h, %1.4s" : "=w"(halves) : "w"(x));
    return halves;
}

/* As the products, it takes subnormal numbers as 0. */
FA_INLINE void vec_store_bfloat16(void *dst, vec x)
{
    const half_words halves = convert_to_bfloat16(x);
    memcpy(dst, &halves, 8);
}

#define vec_store_bfloat16 vec_store_bfloat16

#include "../kernel/elements.h"

FA_INLINE vec dot_pairs(uvec a, uvec b, vec c)
{
    __asm__("bfdot %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(b), "w"(a));
    return c;
}

/* dot_pairs of `a` in every lane. */
FA_INLINE vec dot_operand(uint32_t a, uvec b, vec c)
{
    __asm__("bfdot %0.4s, %1.8h, %2.2h[0]" : "+w"(c) : "w"(b), "w"(a));
    return c;
}

#define dot_operand dot_operand

FA_INLINE vec multiply_add_nth(operand_pair x, int nth, uvec b, vec c)
{
    if (nth == 0)
        __asm__("bfdot %0.4s, %1.8h, %2.2h[0]" : "+w"(c) : "w"(b), "w"(x));
    else
        __asm__("bfdot %0.4s, %1.8h, %2.2h[1]" : "+w"(c) : "w"(b), "w"(x));
    return c;
}

/* It asks for its register itself. */
#undef LOAD_OPERAND

/* Lanes (bfloat16(low), bfloat16(high)). */
FA_INLINE uvec round_pairs(vec low, vec high)
{
    const half_words a = convert_to_bfloat16(low), b = convert_to_bfloat16(high);
    return (uvec)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b);
}

#endif

/* NEON, which every aarch64 CPU has: 32 registers of 16 bytes. float16 is converted by FCVTL and FCVTN,
 * bfloat16 by shifts.
 *
 * Registers of the micro-kernel at 8 × 3: 24 accumulators + 3 panel vectors + 1 operand = 28/32, or 31/32 for
 * two steps at a time. An operand is an element by which multiply-adds multiply a whole vector: its load
 * takes no pipe of theirs, which one that broadcasts does on Neoverse (8 of 32 operations). */
#ifndef FA_KERNEL_ELEMENT_H /* in an editor */
#include "../kernel/element_float32.h"
#endif

#ifndef FA_ISA_NEON_H
#define FA_ISA_NEON_H

/* Scheduled before registers are given out, loads of the micro-kernel's second step would move up into the
 * first one, and GCC would keep accumulators in memory. The CPU itself executes them early. */
#ifndef __clang__
#pragma GCC optimize("no-schedule-insns")
#endif

#include <arm_neon.h>
#include <string.h>

#define FA_VECTOR_BYTES 16
#define MAX_VECTORS 3
#define MIN_VECTORS 1
#define MICRO_ROWS(vectors) 8

#include "../kernel/vec_types.h"

/* As what it is, for GCC would load a float by memcpy as an integer and move it, and into a vector register,
 * or both GCC and clang would broadcast it. */
#define LOAD_OPERAND(x, at)                                                                                  \
    do {                                                                                                     \
        typedef __typeof__(x) in_place __attribute__((aligned(1), may_alias));                               \
        (x) = *(const in_place *)(at);                                                                       \
        __asm__("" : "+w"(x));                                                                               \
    } while (0)

/* Two operands that lie side by side, of which multiply-adds take either: half the loads. */
#define HAS_OPERAND_PAIRS

#if FA_REAL_BYTES == 4
typedef float32x2_t operand_pair;
#else
typedef float64x2_t operand_pair;
#endif

FA_INLINE operand_pair load_operand_pair(const char *at)
{
    typedef operand_pair in_place __attribute__((aligned(1), may_alias));
    return *(const in_place *)at;
}

/* Written out, or clang would move loads up, and keep accumulators in memory. */
#ifndef FA_ISA_NEONBF16_H
FA_INLINE vec multiply_add_nth(operand_pair x, int nth, vec b, vec c)
{
#if FA_REAL_BYTES == 4
    if (nth == 0)
        __asm__("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(c) : "w"(b), "w"(x));
    else
        __asm__("fmla %0.4s, %1.4s, %2.s[1]" : "+w"(c) : "w"(b), "w"(x));
#else
    if (nth == 0)
        __asm__("fmla %0.2d, %1.2d, %2.d[0]" : "+w"(c) : "w"(b), "w"(x));
    else
        __asm__("fmla %0.2d, %1.2d, %2.d[1]" : "+w"(c) : "w"(b), "w"(x));
#endif
    return c;
}
#endif

#if FA_REAL_BYTES == 4
FA_INLINE vec vec_select(ivec where, vec yes, vec no)
{
    return (vec)vbslq_f32((uint32x4_t)where, (float32x4_t)yes, (float32x4_t)no);
}

FA_INLINE bool vmask_any(ivec where)
{
    return vmaxvq_u32((uint32x4_t)where) != 0;
}

FA_INLINE vec vec_round(vec x)
{
    return (vec)vrndnq_f32((float32x4_t)x);
}

/* Lane i of the result is the sum of x[i]'s lanes. */
FA_INLINE vec vec_sums(const vec x[4])
{
    const float32x4_t low = vpaddq_f32((float32x4_t)x[0], (float32x4_t)x[1]);
    const float32x4_t high = vpaddq_f32((float32x4_t)x[2], (float32x4_t)x[3]);
    return (vec)vpaddq_f32(low, high);
}

/* 4 halves at src, as lanes. */
FA_INLINE uvec uvec_load_halves(const void *src)
{
    uint16x4_t halves;
    memcpy(&halves, src, sizeof halves);
    return (uvec)vmovl_u16(halves);
}

/* 4 float16 at src. Conversions keep subnormal float16 whatever the float mode. */
FA_INLINE vec vec_load_float16(const void *src)
{
    float16x4_t halves;
    memcpy(&halves, src, sizeof halves);
    return (vec)vcvt_f32_f16(halves);
}

FA_INLINE void vec_store_float16(void *dst, vec x)
{
    const float16x4_t halves = vcvt_f16_f32((float32x4_t)x);
    memcpy(dst, &halves, sizeof halves);
}

FA_INLINE vec vec_load_int8(const void *src)
{
    uint32_t bytes;
    memcpy(&bytes, src, sizeof bytes);
    const int16x8_t words = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)));
    return (vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
}

#define uvec_load_halves uvec_load_halves
#define vec_load_float16 vec_load_float16
#define vec_load_int8 vec_load_int8
#else
FA_INLINE vec vec_select(ivec where, vec yes, vec no)
{
    return (vec)vbslq_f64((uint64x2_t)where, (float64x2_t)yes, (float64x2_t)no);
}

FA_INLINE bool vmask_any(ivec where)
{
    return vmaxvq_u32((uint32x4_t)where) != 0;
}

FA_INLINE vec vec_round(vec x)
{
    return (vec)vrndnq_f64((float64x2_t)x);
}

FA_INLINE vec vec_sums(const vec x[2])
{
    return (vec)vpaddq_f64((float64x2_t)x[0], (float64x2_t)x[1]);
}
#endif

/* Of the lower halves of 64 bits. */
#define multiply_words(a, b) ((word_vec)vmull_u32(vmovn_u64((uint64x2_t)(a)), vdup_n_u32(b)))

#define vec_select vec_select
#define vec_round vec_round
#define vec_sums vec_sums

#endif

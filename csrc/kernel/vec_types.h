/* The vector of `real` of an instruction set, and its integer twins.
 *
 * Included by the instruction set's file, after element_*.h and FA_VECTOR_BYTES.
 *
 * Requires element_*.h and FA_VECTOR_BYTES; provides vec, ivec, uvec and LANES, FA_INLINE, min_i64 and
 * max_i64. */
#include "for_editors.h"

#ifndef FA_KERNEL_VEC_TYPES_H
#define FA_KERNEL_VEC_TYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && !defined(__clang__)
#error "GCC does not align vectors on the stack for Windows (its bug 54412): compile with clang, or zig cc"
#endif

#define FA_INLINE static inline __attribute__((always_inline))

FA_INLINE int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

FA_INLINE int64_t max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

#define LANES (FA_VECTOR_BYTES / FA_REAL_BYTES)
#define LANE_BITS (8 * FA_REAL_BYTES)

/* Below 2^LOWEST_EXPONENT a power is 0. In float32 those are the subnormal numbers, which the kernels' float
 * mode takes for 0 anyway. float64 keeps subnormal numbers, which are slow; this far above them, products of
 * powers with values, and their sums, are normal too where values exceed 2^-62. A row's largest power is 1 or
 * more, so what is lost is below 2^-960 times the largest value for each key. */
#define LOWEST_EXPONENT (FA_REAL_BYTES == 4 ? -126 : -960)

typedef real vec __attribute__((vector_size(FA_VECTOR_BYTES)));
typedef lane_int ivec __attribute__((vector_size(FA_VECTOR_BYTES)));
/* Panels of packed pairs lie where scores lay: may_alias. */
typedef lane_uint uvec __attribute__((vector_size(FA_VECTOR_BYTES), may_alias));
typedef real vec_unaligned __attribute__((vector_size(FA_VECTOR_BYTES), aligned(1), may_alias));

FA_INLINE vec vec_splat(real x)
{
    return x - (vec){0};
}

FA_INLINE ivec ivec_splat(lane_int x)
{
    return x - (ivec){0};
}

FA_INLINE vec vec_load(const void *src)
{
    return *(const vec_unaligned *)src;
}

FA_INLINE void vec_store(void *dst, vec x)
{
    *(vec_unaligned *)dst = x;
}

#endif

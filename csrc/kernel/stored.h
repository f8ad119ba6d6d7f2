/* Stored dtypes: an element of each, and a vector of elements side by side, to and from `real`. What
 * csrc/dtypes.h has a row for needs a case of load_element and of store_element; vectors of dtypes that are
 * not loaded or stored as such go by single elements.
 *
 * Requires vec.h; provides load_element, store_element, load_contiguous and store_contiguous. */
#include "for_editors.h"

#ifndef FA_KERNEL_STORED_H
#define FA_KERNEL_STORED_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "../dtypes.h"
#include "vec.h"

FA_INLINE int element_size(fa_dtype dtype)
{
    return fa_traits(dtype).bytes;
}

FA_INLINE float float_from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

FA_INLINE uint32_t bits_from_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

FA_INLINE float float_from_float16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) /* inf, NaN */
        return float_from_bits(sign | magnitude << 13 | 0x7f800000);
    if (magnitude < 0x400) /* subnormal; not as a float32, which would be taken for 0 */
        return float_from_bits(sign | bits_from_float((float)magnitude * 0x1p-24f));
    return float_from_bits(sign | ((magnitude << 13) + 0x38000000)); /* the exponents differ by 112 */
}

FA_INLINE uint16_t float16_from_float(float x)
{
    uint32_t bits = bits_from_float(x);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000) /* 65520 and more round to infinity */
        return sign | 0x7c00;
    if (magnitude < 0x38800000) /* below 2^-14: the sum's last bit is 2^-24, and the adder rounds */
        return sign | (uint16_t)(bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000);
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1); /* to nearest, ties to even */
    return sign | (uint16_t)((rounded - 0x38000000) >> 13);
}

FA_INLINE float float_from_bfloat16(uint16_t b)
{
    return float_from_bits((uint32_t)b << 16);
}

FA_INLINE uint16_t bfloat16_from_float(float x)
{
    uint32_t bits = bits_from_float(x);
    if (isnan(x))
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

FA_INLINE real load_element(const char *src, fa_dtype dtype)
{
    float f;
    double d;
    uint16_t h;
    switch (dtype) {
    case FA_FLOAT32:
        memcpy(&f, src, sizeof f);
        return (real)f;
    case FA_FLOAT64:
        memcpy(&d, src, sizeof d);
        if (FA_REAL_BYTES == 4 && isfinite(d)) /* a huge bias hides nothing, unless it is -inf */
            d = fmin(fmax(d, -FLT_MAX), FLT_MAX);
        return (real)d;
    case FA_FLOAT16:
        memcpy(&h, src, sizeof h);
        return (real)float_from_float16(h);
    case FA_INT8:
        return (real) * (const int8_t *)src;
    case FA_BFLOAT16:
        memcpy(&h, src, sizeof h);
        return (real)float_from_bfloat16(h);
    }
    __builtin_unreachable();
}

FA_INLINE void store_element(char *dst, fa_dtype dtype, real x)
{
    float f = (float)x;
    double d = (double)x;
    uint16_t h;
    switch (dtype) {
    case FA_FLOAT32:
        memcpy(dst, &f, sizeof f);
        break;
    case FA_FLOAT64:
        memcpy(dst, &d, sizeof d);
        break;
    case FA_FLOAT16:
        h = float16_from_float(f);
        memcpy(dst, &h, sizeof h);
        break;
    case FA_BFLOAT16:
        h = bfloat16_from_float(f);
        memcpy(dst, &h, sizeof h);
        break;
    case FA_INT8: /* is only read */
        break;
    }
}

#if FA_REAL_BYTES == 4
typedef uint16_t halves __attribute__((vector_size(FA_VECTOR_BYTES)));
typedef uint16_t half_vec __attribute__((vector_size(FA_VECTOR_BYTES / 2)));
typedef uint16_t half_vec_unaligned __attribute__((vector_size(FA_VECTOR_BYTES / 2), aligned(1), may_alias));

#ifndef uvec_load_halves
FA_INLINE uvec uvec_load_halves(const void *src)
{
    return __builtin_convertvector(*(const half_vec_unaligned *)src, uvec);
}
#endif

FA_INLINE vec vec_load_bfloat16(const void *src)
{
    return (vec)(uvec_load_halves(src) << 16);
}

#ifndef vec_load_int8
FA_INLINE vec vec_load_int8(const void *src)
{
    typedef int8_t bytes_unaligned __attribute__((vector_size(LANES), aligned(1), may_alias));
    return __builtin_convertvector(*(const bytes_unaligned *)src, vec);
}
#endif

/* The halves, as lanes. */
FA_INLINE uvec round_to_bfloat16(vec x)
{
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uvec quiet_nan = bits >> 16 | 0x40;
    return (uvec)vec_select(vec_equal(x, x), (vec)rounded, (vec)quiet_nan);
}

#ifndef vec_store_bfloat16
FA_INLINE void vec_store_bfloat16(void *dst, vec x)
{
    *(half_vec_unaligned *)dst = __builtin_convertvector(round_to_bfloat16(x), half_vec);
}
#endif

#ifndef vec_load_float16
FA_INLINE vec vec_load_float16(const void *src)
{
    vec x = {0};
    for (int i = 0; i < LANES; i++)
        x[i] = load_element((const char *)src + 2 * i, FA_FLOAT16);
    return x;
}

FA_INLINE void vec_store_float16(void *dst, vec x)
{
    for (int i = 0; i < LANES; i++)
        store_element((char *)dst + 2 * i, FA_FLOAT16, x[i]);
}
#endif
#endif

/* LANES contiguous elements. */
FA_INLINE vec load_contiguous(const char *src, fa_dtype dtype)
{
    if (dtype == FA_REAL_DTYPE)
        return vec_load(src);
#if FA_REAL_BYTES == 4
    if (dtype == FA_FLOAT16)
        return vec_load_float16(src);
    if (dtype == FA_BFLOAT16)
        return vec_load_bfloat16(src);
    if (dtype == FA_INT8)
        return vec_load_int8(src);
#endif
    vec x = {0};
    for (int i = 0; i < LANES; i++)
        x[i] = load_element(src + i * element_size(dtype), dtype);
    return x;
}

FA_INLINE void store_contiguous(char *dst, fa_dtype dtype, vec x)
{
    if (dtype == FA_REAL_DTYPE) {
        vec_store(dst, x);
        return;
    }
#if FA_REAL_BYTES == 4
    if (dtype == FA_FLOAT16) {
        vec_store_float16(dst, x);
        return;
    }
    if (dtype == FA_BFLOAT16) {
        vec_store_bfloat16(dst, x);
        return;
    }
#endif
    for (int i = 0; i < LANES; i++)
        store_element(dst + i * element_size(dtype), dtype, x[i]);
}

#endif

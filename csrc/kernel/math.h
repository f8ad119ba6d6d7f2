/* exp2 and tanh of vectors, from one polynomial. */
#ifndef FA_KERNEL_MATH_H
#define FA_KERNEL_MATH_H

#include "vec.h"

FA_INLINE vec polynomial(const real *coefficients, int degree, vec r)
{
    vec q = vec_splat(coefficients[degree]);
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; i--)
        q = q * r + coefficients[i];
    return q;
}

/* (2^r - 1) / r on [-1/2, 1/2]: minimax in the relative error of 2^r, which is 1.1e-7 for float (degree 5 in
 * all; its epsilon is 1.2e-7) and 1.8e-17 for double (degree 11). 2^0 is exact. */
FA_INLINE vec vec_exp2m1_over_r(vec r)
{
#if FA_REAL_BYTES == 4
    static const real c[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba12p-10f};
#else
    static const real c[] = {0x1.62e42fefa39f3p-1,  0x1.ebfbdff82c598p-3,  0x1.c6b08d7048f31p-5,
                             0x1.3b2ab6fba1e1cp-7,  0x1.5d87fe7bbbe07p-10, 0x1.4309130961163p-13,
                             0x1.ffcbee3b0af8cp-17, 0x1.62bfd49ed0adfp-20, 0x1.b54167a0b9061p-24,
                             0x1.e605f979c7a5dp-28, 0x1.c0638527edf34p-32};
#endif
    return polynomial(c, (int)(sizeof c / sizeof *c) - 1, r);
}

/* t = n + r, with n integral and |r| <= 1/2; of -inf, n is -inf and r NaN. */
typedef struct {
    vec n, r;
} exponent;

FA_INLINE exponent split_exponent(vec t)
{
    vec n = vec_round(t);
    return (exponent){n, t - n};
}

/* 2^t for t up to the exponent range; 0 for t = -inf and wherever the result is below the normal
 * numbers on instruction sets without a scaling instruction. NaN stays NaN. */
FA_INLINE vec vec_exp2_of(exponent t)
{
    return vec_scale_exponent(vec_exp2m1_over_r(t.r) * t.r + 1, t.n);
}

FA_INLINE vec vec_exp2(vec t)
{
    return vec_exp2_of(split_exponent(t));
}

/* tanh(x · factor): v / (2 - v) with x's sign, of v = 1 - e^(-2|x · factor|), which keeps its relative
 * accuracy near 0 because it is (1 - 2^n) - 2^n (2^r - 1). Beyond the clamp it is 1 to the last bit. */
FA_INLINE vec vec_tanh(vec x, real factor)
{
    const real two_log2e = (real)2.885390081777926814720;
    const real lowest = FA_REAL_BYTES == 4 ? -30 : -60;
    vec minus_twice = vec_abs(x) * (-two_log2e * factor);                 /* in units of log2 */
    exponent t = split_exponent(vec_max(vec_splat(lowest), minus_twice)); /* NaN stays */
    vec power = vec_scale_exponent(vec_splat(1), t.n);
    vec v = (1 - power) - vec_exp2m1_over_r(t.r) * (t.r * power);
    return vec_copysign(v / (2 - v), x);
}

#endif

/* exp2 and tanh of vectors.
 *
 * Requires vec.h; provides vec_exp2 and vec_tanh. */
#include "for_editors.h"

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

/* 2^t for t up to the exponent range; 0 for t = -inf and wherever the result is below 2^LOWEST_EXPONENT. NaN
 * stays NaN. */
FA_INLINE vec vec_exp2_of(exponent t)
{
    return vec_scale_exponent(vec_exp2m1_over_r(t.r) * t.r + 1, t.n);
}

FA_INLINE vec vec_exp2(vec t)
{
    return vec_exp2_of(split_exponent(t));
}

/* Up to here tanh is a polynomial, which takes half the time. */
#define TANH_NEAR_ZERO ((real)0.75)

/* tanh x for |x| <= 3/4: x (1 + z P(z)) of z = x², minimax in the relative error, which is 3.7e-8 for float
 * and 4.2e-17 for double. */
FA_INLINE vec vec_tanh_near_zero(vec x)
{
#if FA_REAL_BYTES == 4
    static const real c[] = {-0x1.5554a4p-2f, 0x1.10ed5ap-3f, -0x1.b55f7cp-5f, 0x1.4230a0p-6f,
                             -0x1.3892c6p-8f};
#else
    static const real c[] = {-0x1.5555555555490p-2,  0x1.111111110559cp-3,   -0x1.ba1ba1b250e86p-5,
                             0x1.664f47351a2a3p-6,   -0x1.226e148a8b24bp-7,  0x1.d6cfaecd13b02p-9,
                             -0x1.7d76aa156ce34p-10, 0x1.340a6778c85dap-11,  -0x1.e7ef4b53accf9p-13,
                             0x1.658c48f2fe49ap-14,  -0x1.a169748811dd9p-16, 0x1.115fef7407529p-18};
#endif
    vec z = x * x;
    return x * (z * polynomial(c, (int)(sizeof c / sizeof *c) - 1, z) + 1);
}

/* tanh of any x. Far from 0 it is v / (2 - v) with x's sign, of v = 1 - e^(-2|x|), where e^(-2|x|) is 2^n
 * 2^r; beyond the clamp it is 1 to the last bit. */
FA_INLINE vec vec_tanh(vec x)
{
    const real minus_two_log2e = (real)-2.885390081777926814720;
    const real lowest = FA_REAL_BYTES == 4 ? -30 : -60;
    exponent t = split_exponent(vec_max(vec_splat(lowest), vec_abs(x) * minus_two_log2e)); /* NaN stays */
    vec power = vec_scale_exponent(vec_splat(1), t.n);
    vec v = (1 - power) - vec_exp2m1_over_r(t.r) * (t.r * power);
    vec far = vec_copysign(v / (2 - v), x);
    return vec_select(vec_greater(vec_abs(x), vec_splat(TANH_NEAR_ZERO)), far, vec_tanh_near_zero(x));
}

#endif

/* The float mode of the calling thread: how it rounds, and what it takes subnormal numbers for. And one in
 * which subnormal numbers are 0, as operands and as results.
 *
 * A probability far below its row's largest is subnormal in float32, and so are its products. CPUs compute
 * such numbers in microcode, many times more slowly. They are below 2^-126, so a row loses less than 2^-126
 * times its largest value for each key. */
#ifndef FA_FLOAT_MODE_H
#define FA_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__)

enum { FA_FLUSH_SUBNORMALS = 1 << 6 | 1 << 15 }; /* denormals are zero, flush to zero */

/* For fa_restore_float_mode. */
static inline uint64_t fa_float_mode(void)
{
    return __builtin_ia32_stmxcsr();
}

static inline void fa_restore_float_mode(uint64_t mode)
{
    __builtin_ia32_ldmxcsr((uint32_t)mode);
}

#elif defined(__aarch64__)

enum { FA_FLUSH_SUBNORMALS = 1 << 24 };

static inline uint64_t fa_float_mode(void)
{
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
    return mode;
}

static inline void fa_restore_float_mode(uint64_t mode)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
}

#else

#include <fenv.h>

enum { FA_FLUSH_SUBNORMALS = 0 };

static inline uint64_t fa_float_mode(void)
{
    return (uint64_t)fegetround();
}

static inline void fa_restore_float_mode(uint64_t mode)
{
    fesetround((int)mode);
}

#endif

/* Returns the mode until now. */
static inline uint64_t fa_flush_subnormals(void)
{
    const uint64_t mode = fa_float_mode();
    fa_restore_float_mode(mode | FA_FLUSH_SUBNORMALS);
    return mode;
}

#endif

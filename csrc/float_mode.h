/* Subnormal numbers taken for 0, as operands and as results, by the calling thread.
 *
 * A probability far below its row's largest, and all that is made of it, is subnormal in float32, and CPUs
 * compute such numbers in microcode: Intel up to 100 times more slowly. They are below 2^-126, so what is
 * lost of a row is below 2^-126 times its largest value for each key. */
#ifndef FA_FLOAT_MODE_H
#define FA_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__)

/* Returns the mode until now, for fa_restore_float_mode. */
static inline uint64_t fa_flush_subnormals(void)
{
    enum { DENORMALS_ARE_ZERO = 1 << 6, FLUSH_TO_ZERO = 1 << 15 };
    const uint32_t mode = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(mode | DENORMALS_ARE_ZERO | FLUSH_TO_ZERO);
    return mode;
}

static inline void fa_restore_float_mode(uint64_t mode)
{
    __builtin_ia32_ldmxcsr((uint32_t)mode);
}

#elif defined(__aarch64__)

static inline void fa_restore_float_mode(uint64_t mode)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory");
}

static inline uint64_t fa_flush_subnormals(void)
{
    const uint64_t flush_to_zero = 1 << 24;
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
    fa_restore_float_mode(mode | flush_to_zero);
    return mode;
}

#else

static inline uint64_t fa_flush_subnormals(void)
{
    return 0;
}

static inline void fa_restore_float_mode(uint64_t mode)
{
    (void)mode;
}

#endif

#endif

/* Products of bfloat16 pairs in the baseline's 16-byte vectors, in plain C: for tests of what such an
 * instruction set (NEON's BF16) needs, on any CPU.
 *
 * Registers of the micro-kernel as in baseline.h. */
#ifndef FA_ISA_BF16EMULATED_H
#define FA_ISA_BF16EMULATED_H

#include "baseline.h"

#include "../kernel/stored.h"

FA_INLINE vec dot_pairs(uvec a, uvec b, vec c)
{
    return c + (vec)(a << 16) * (vec)(b << 16) + (vec)(a & 0xffff0000) * (vec)(b & 0xffff0000);
}

/* Lanes (bfloat16(low), bfloat16(high)). */
FA_INLINE uvec round_pairs(vec low, vec high)
{
    return round_to_bfloat16(low) | round_to_bfloat16(high) << 16;
}

#endif

/* The tile unit (AMX): eight registers of 16 rows of 64 bytes, and the operations on them that the kernel
 * uses. With FA_EMULATE_TILES they are plain C, to the same bits, so that tests of the kernel run on CPUs
 * without it.
 *
 * Requires vec_types.h. */
#include "for_editors_amx.h"

#ifndef FA_KERNEL_TILE_UNIT_H
#define FA_KERNEL_TILE_UNIT_H

#include <string.h>

#include "vec_types.h"

/* Rows of a register, of 16 floats or 32 bfloat16. */
#define TMM_ROWS 16

/* What of each register is in use: so much is loaded and stored, and the rest of it is 0. */
typedef struct {
    uint8_t rows[8];
    uint8_t row_bytes[8];
} tmm_shapes;

static const tmm_shapes whole_registers = {{16, 16, 16, 16, 16, 16, 16, 16},
                                           {64, 64, 64, 64, 64, 64, 64, 64}};

#ifdef FA_EMULATE_TILES

static _Thread_local vec tmm_registers[8][TMM_ROWS];
static _Thread_local tmm_shapes tmm_shapes_now;

FA_INLINE void tmm_configure(const tmm_shapes *shapes)
{
    tmm_shapes_now = *shapes;
    memset(tmm_registers, 0, sizeof tmm_registers);
}

FA_INLINE void tmm_release(void) {}

FA_INLINE void tmm_zero(int t)
{
    memset(tmm_registers[t], 0, sizeof tmm_registers[t]);
}

static __attribute__((noinline)) void tmm_load(int t, const void *src, ptrdiff_t stride)
{
    tmm_zero(t);
    for (int r = 0; r < tmm_shapes_now.rows[t]; r++)
        memcpy(&tmm_registers[t][r], (const char *)src + r * stride, tmm_shapes_now.row_bytes[t]);
}

FA_INLINE void tmm_load_stream(int t, const void *src, ptrdiff_t stride)
{
    tmm_load(t, src, stride);
}

static __attribute__((noinline)) void tmm_store(int t, void *dst, ptrdiff_t stride)
{
    for (int r = 0; r < tmm_shapes_now.rows[t]; r++)
        memcpy((char *)dst + r * stride, &tmm_registers[t][r], tmm_shapes_now.row_bytes[t]);
}

/* The even and the odd elements are summed apart, by fused multiply-adds that take subnormal numbers for 0,
 * as the float mode of the kernels' threads makes those here; then both are added to c. */
static __attribute__((noinline)) void tmm_dot(int c, int a, int b)
{
    for (int i = 0; i < TMM_ROWS; i++) {
        const uvec row = (uvec)tmm_registers[a][i];
        vec even = vec_splat(0), odd = vec_splat(0);
        for (int k = 0; k < TMM_ROWS; k++) {
            const uvec x = row[k] - (uvec){0}, y = (uvec)tmm_registers[b][k];
            even += (vec)(x << 16) * (vec)(y << 16);
            odd += (vec)(x & 0xffff0000) * (vec)(y & 0xffff0000);
        }
        tmm_registers[c][i] += even + odd;
    }
}

#else

/* All registers are 0 then. */
FA_INLINE void tmm_configure(const tmm_shapes *shapes)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = shapes->row_bytes[i];
        config.rows[i] = shapes->rows[i];
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

FA_INLINE void tmm_release(void)
{
    __asm__ volatile("tilerelease");
}

FA_INLINE void tmm_zero(int t)
{
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
}

/* Not the compiler's intrinsics, which do not tell it that they touch memory. */
FA_INLINE void tmm_load(int t, const void *src, ptrdiff_t stride)
{
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(src), "r"(stride), "i"(t) : "memory");
}

/* Of what is read once before it is pushed out of L1. */
FA_INLINE void tmm_load_stream(int t, const void *src, ptrdiff_t stride)
{
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(src), "r"(stride), "i"(t) : "memory");
}

FA_INLINE void tmm_store(int t, void *dst, ptrdiff_t stride)
{
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(dst), "r"(stride), "i"(t) : "memory");
}

/* c[i][j] += Σ_k a[i][k] · b[k][j] over 16 pairs k */
FA_INLINE void tmm_dot(int c, int a, int b)
{
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

#endif

#endif

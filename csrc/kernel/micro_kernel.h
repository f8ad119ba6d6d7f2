/* The micro-kernel: MICRO_ROWS rows of operands, each broadcast against the vectors of a packed row, summed
 * in registers. The instruction set's file has its register budget.
 *
 * Requires an operand and MICRO_ROWS; provides micro_kernel. */
#include "for_editors.h"

#ifndef FA_KERNEL_MICRO_KERNEL_H
#define FA_KERNEL_MICRO_KERNEL_H

#include "product.h"

/* Loads an operand; an instruction set may want it in a vector register, as one element. */
#ifndef LOAD_OPERAND
#define LOAD_OPERAND(x, at) memcpy(&(x), at, sizeof(x))
#endif

#ifdef HAS_OPERAND_PAIRS
/* Steps of a product whose operands lie side by side, loaded in twos: of two rows, or of two steps. Returns
 * the step up to which it came. */
FA_INLINE int product_steps_in_pairs(const char *const *a, bool side_by_side, ptrdiff_t step,
                                     const packed_vec *b, int begin, int end, int vectors,
                                     vec c[MAX_MICRO_ROWS][MAX_VECTORS])
{
    const int rows = MICRO_ROWS(vectors);
    const int steps = side_by_side ? 1 : 2, stop = end - (end - begin) % steps;
    const packed_vec *last = b + (ptrdiff_t)stop * vectors;
    ptrdiff_t offset = begin * step;
    const char *first = a[0] + offset;
    b += (ptrdiff_t)begin * vectors;
    for (; b != last; b += steps * vectors, offset += steps * step, first += step) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; i += side_by_side ? 2 : 1) {
            const operand_pair x =
                load_operand_pair(side_by_side ? first + i * (int)sizeof(operand) : a[i] + offset);
#pragma GCC unroll 3
            for (int m = 0; m < vectors; m++)
                c[i][m] = multiply_add_nth(x, 0, b[m], c[i][m]);
#pragma GCC unroll 3
            for (int m = 0; m < vectors; m++) {
                vec *sum = side_by_side ? &c[i + 1][m] : &c[i][m];
                *sum = multiply_add_nth(x, 1, b[side_by_side ? m : vectors + m], *sum);
            }
        }
    }
    return stop;
}
#endif

/* Steps [begin, end) of a product. nan_safe: what a masked probability meets adds nothing, be it NaN. */
FA_INLINE void product_steps(const char *const *a, bool side_by_side, ptrdiff_t step, const packed_vec *b,
                             int begin, int end, int vectors, bool nan_safe,
                             vec c[MAX_MICRO_ROWS][MAX_VECTORS])
{
    const int rows = MICRO_ROWS(vectors);
    const packed_vec *stop = b + (ptrdiff_t)end * vectors;
#ifdef HAS_OPERAND_PAIRS
    if (!nan_safe && (side_by_side || step == sizeof(operand)))
        begin = product_steps_in_pairs(a, side_by_side, step, b, begin, end, vectors, c);
#endif
    ptrdiff_t offset = begin * step;
    const char *first = a[0] + offset;
    b += (ptrdiff_t)begin * vectors;
#pragma GCC unroll 2 /* four times gain no more, and cost float64 on AVX2 a quarter */
    for (; b != stop; b += vectors, offset += step, first += step) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            operand x;
            LOAD_OPERAND(x, side_by_side ? first + i * (int)sizeof x : a[i] + offset);
#pragma GCC unroll 3
            for (int m = 0; m < vectors; m++)
                c[i][m] = nan_safe ? multiply_add_nan_safe(x, b[m], c[i][m]) : multiply_add(x, b[m], c[i][m]);
        }
    }
}

/* c[i][m] += Σ_k a[i][k] · b[k][m] for i < MICRO_ROWS(vectors): operands of row i at a[i], `step` bytes
 * apart, each broadcast against the `vectors` lanes of b[k]. Rows side by side: row i begins i operands
 * behind a[0], and one address serves all of them. Most products prefetch nothing, and have a loop to
 * themselves: cut into stretches it takes bfloat16 2 % longer. */
FA_INLINE void micro_kernel(const char *const *a, bool side_by_side, ptrdiff_t step, const packed_vec *b,
                            int length, int vectors, const product_prefetch *prefetch,
                            vec c[MAX_MICRO_ROWS][MAX_VECTORS])
{
    const char *data = prefetch->data;
    if (prefetch->every >= length) {
        prefetch_burst(prefetch, data);
        product_steps(a, side_by_side, step, b, 0, length, vectors, false, c);
        return;
    }
    for (int k = 0, end; k < length; k = end, data += 64 * prefetch->lines) {
        end = length - k > prefetch->every ? k + prefetch->every : length;
        prefetch_burst(prefetch, data);
        product_steps(a, side_by_side, step, b, k, end, vectors, false, c);
    }
}

#endif

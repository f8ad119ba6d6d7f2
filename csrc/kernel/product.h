/* The micro-kernel: every product of the library is this one. */
#ifndef FA_KERNEL_PRODUCT_H
#define FA_KERNEL_PRODUCT_H

#define MAX_VECTORS 3
#define MAX_MICRO_ROWS 8

/* Rows that a product may write beyond the last. */
#define MAX_SPARE_ROWS 16

/* c[i][m] += Σ_k a[i][k] · b[k][m] for i < MICRO_ROWS(vectors): operands of row i at a[i], `step` bytes
 * apart, each broadcast against the `vectors` lanes of b[k]. Rows side by side: row i begins i operands
 * behind a[0], and one address serves all of them. */
FA_INLINE void product(const char *const *a, bool side_by_side, ptrdiff_t step, const panel *b, int length,
                       int vectors, bool visible_only, vec c[MAX_MICRO_ROWS][MAX_VECTORS])
{
    const int rows = MICRO_ROWS(vectors);
    const panel *end = b + (ptrdiff_t)length * vectors;
    const char *first = a[0];
#pragma GCC unroll 2 /* four times gain no more, and cost float64 on AVX2 a quarter */
    for (ptrdiff_t offset = 0; b != end; b += vectors, offset += step, first += step) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            operand x;
            memcpy(&x, side_by_side ? first + i * (int)sizeof x : a[i] + offset, sizeof x);
#pragma GCC unroll 3
            for (int m = 0; m < vectors; m++)
                c[i][m] =
                    visible_only ? multiply_add_visible(x, b[m], c[i][m]) : multiply_add(x, b[m], c[i][m]);
        }
    }
}

#endif

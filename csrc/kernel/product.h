/* The micro-kernel: every product of the library is this one. */
#ifndef FA_KERNEL_PRODUCT_H
#define FA_KERNEL_PRODUCT_H

#define MAX_VECTORS 3
#define MAX_MICRO_ROWS 8

/* Rows that a product may write beyond the last. */
#define MAX_SPARE_ROWS 16

/* Lines that a product asks for in its course: of `rows` rows, `row` bytes apart, `lines` lines each, every
 * `every` steps of the reduction. In one burst they would take all places for what L1 has missed, and the
 * product's own operands would wait behind them: keys from memory then cost a tenth. */
typedef struct {
    const char *data;
    ptrdiff_t row;
    int rows, lines;
    int every; /* at least 1, but of products without steps */
} product_prefetch;

FA_INLINE void prefetch_burst(const product_prefetch *prefetch, const char *data)
{
    for (int i = 0; i < prefetch->rows; i++, data += prefetch->row)
#pragma GCC unroll 4
        for (int line = 0; line < prefetch->lines; line++)
            __builtin_prefetch(data + 64 * line, 0, 2);
}

/* Steps [begin, end) of a product. */
FA_INLINE void product_steps(const char *const *a, bool side_by_side, ptrdiff_t step, const packed_vec *b,
                             int begin, int end, int vectors, bool nan_safe,
                             vec c[MAX_MICRO_ROWS][MAX_VECTORS])
{
    const int rows = MICRO_ROWS(vectors);
    const packed_vec *stop = b + (ptrdiff_t)end * vectors;
    ptrdiff_t offset = begin * step;
    const char *first = a[0] + offset;
    b += (ptrdiff_t)begin * vectors;
#pragma GCC unroll 2 /* four times gain no more, and cost float64 on AVX2 a quarter */
    for (; b != stop; b += vectors, offset += step, first += step) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            operand x;
            memcpy(&x, side_by_side ? first + i * (int)sizeof x : a[i] + offset, sizeof x);
#pragma GCC unroll 3
            for (int m = 0; m < vectors; m++)
                c[i][m] = nan_safe ? multiply_add_nan_safe(x, b[m], c[i][m]) : multiply_add(x, b[m], c[i][m]);
        }
    }
}

/* c[i][m] += Σ_k a[i][k] · b[k][m] for i < MICRO_ROWS(vectors): operands of row i at a[i], `step` bytes
 * apart, each broadcast against the `vectors` lanes of b[k]. Rows side by side: row i begins i operands
 * behind a[0], and one address serves all of them. Most products ask for nothing, and have a loop to
 * themselves: cut into stretches it takes bfloat16 2 % longer. */
FA_INLINE void product(const char *const *a, bool side_by_side, ptrdiff_t step, const packed_vec *b,
                       int length, int vectors, bool nan_safe, const product_prefetch *prefetch,
                       vec c[MAX_MICRO_ROWS][MAX_VECTORS])
{
    const char *data = prefetch->data;
    if (prefetch->every >= length) {
        prefetch_burst(prefetch, data);
        product_steps(a, side_by_side, step, b, 0, length, vectors, nan_safe, c);
        return;
    }
    for (int k = 0, end; k < length; k = end, data += 64 * prefetch->lines) {
        end = length - k > prefetch->every ? k + prefetch->every : length;
        prefetch_burst(prefetch, data);
        product_steps(a, side_by_side, step, b, k, end, vectors, nan_safe, c);
    }
}

#endif

/* Products of a tile whose lanes are query rows, in the tile unit (AMX): its registers 0 to 5 hold sums, 2 ×
 * 3 blocks of 16 rows by LANES lanes; 6 holds 16 rows of operands, 7 a block of the panel.
 *
 * Budget: 16 cycles for each of the 6 products of a step, 8 for each of the 8 loads beside them. */
#ifndef FA_KERNEL_PRODUCT_AMX_H
#define FA_KERNEL_PRODUCT_AMX_H

#include <stdatomic.h>

#include "micro_kernel.h"

#define BLOCK_ROWS 16
#define PASS_ROWS (2 * BLOCK_ROWS)
#define PRODUCT_ROWS(vectors) PASS_ROWS

/* The unit's intrinsics do not tell the compiler that they read memory. */
FA_INLINE void finish_stores(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

/* Before every key block: between two, a signal handler may have made a call that released the unit. */
FA_INLINE void begin_products(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = FA_VECTOR_BYTES;
        shapes.rows[i] = BLOCK_ROWS;
    }
    finish_stores();
    _tile_loadconfig(&shapes);
}

/* Else the operating system would save the registers at every switch. */
FA_INLINE void end_products(void)
{
    _tile_release();
}

/* Sums of PASS_ROWS rows, or of half as many, = 0. */
FA_INLINE void clear_sums(int vectors, bool whole)
{
    _tile_zero(0);
    if (vectors > 1)
        _tile_zero(1);
    if (vectors > 2)
        _tile_zero(2);
    if (!whole)
        return;
    _tile_zero(3);
    if (vectors > 1)
        _tile_zero(4);
    if (vectors > 2)
        _tile_zero(5);
}

FA_INLINE void load_sums(const vec *c, int vectors, bool whole)
{
    const ptrdiff_t stride = vectors * (ptrdiff_t)sizeof(vec);
    _tile_loadd(0, c, stride);
    if (vectors > 1)
        _tile_loadd(1, c + 1, stride);
    if (vectors > 2)
        _tile_loadd(2, c + 2, stride);
    if (!whole)
        return;
    c += BLOCK_ROWS * vectors;
    _tile_loadd(3, c, stride);
    if (vectors > 1)
        _tile_loadd(4, c + 1, stride);
    if (vectors > 2)
        _tile_loadd(5, c + 2, stride);
}

FA_INLINE void store_sums(vec *c, int vectors, bool whole)
{
    const ptrdiff_t stride = vectors * (ptrdiff_t)sizeof(vec);
    _tile_stored(0, c, stride);
    if (vectors > 1)
        _tile_stored(1, c + 1, stride);
    if (vectors > 2)
        _tile_stored(2, c + 2, stride);
    if (!whole)
        return;
    c += BLOCK_ROWS * vectors;
    _tile_stored(3, c, stride);
    if (vectors > 1)
        _tile_stored(4, c + 1, stride);
    if (vectors > 2)
        _tile_stored(5, c + 2, stride);
}

/* sums[i][m] += Σ_k a[i][k] · b[k][m]: operand k of row i at a + i * row + k * step. */
FA_INLINE void multiply_blocks(const char *a, ptrdiff_t row, ptrdiff_t step, const packed_vec *b, int length,
                               int vectors, bool whole)
{
    const ptrdiff_t stride = vectors * (ptrdiff_t)sizeof(vec);
    for (int k = 0; k < length; k++, a += step, b += BLOCK_ROWS * vectors) {
        _tile_loadd(6, a, row);
        _tile_loadd(7, b, stride);
        _tile_dpbf16ps(0, 6, 7);
        if (vectors > 1) {
            _tile_loadd(7, b + 1, stride);
            _tile_dpbf16ps(1, 6, 7);
        }
        if (vectors > 2) {
            _tile_loadd(7, b + 2, stride);
            _tile_dpbf16ps(2, 6, 7);
        }
        if (!whole)
            continue;
        _tile_loadd(6, a + BLOCK_ROWS * row, row);
        if (vectors > 2)
            _tile_dpbf16ps(5, 6, 7);
        if (vectors > 1) {
            _tile_loadd(7, b + 1, stride);
            _tile_dpbf16ps(4, 6, 7);
        }
        if (vectors > 1)
            _tile_loadd(7, b, stride);
        _tile_dpbf16ps(3, 6, 7);
    }
}

FA_INLINE void product_scores(const product_rows *a, int i, const packed_vec *b, int length, int vectors,
                              real scale, const product_prefetch *prefetch, vec *panel,
                              vec block_max[MAX_VECTORS])
{
    prefetch_burst(prefetch, prefetch->data);
    finish_stores();
    clear_sums(vectors, true);
    multiply_blocks(a->data + i * a->row, a->row, FA_VECTOR_BYTES, b, length, vectors, true);
    store_sums(panel, vectors, true);
    for (int r = 0; r < PASS_ROWS * vectors && scale != 1; r++)
        panel[r] *= scale;
    for (int r = 0; r < PASS_ROWS && i + r < a->last; r++)
        for (int m = 0; m < vectors; m++)
            block_max[m] = vec_max(panel[r * vectors + m], block_max[m]);
}

/* Values that are hidden from some rows only, pair by pair: the unit multiplies them all. */
FA_INLINE void add_nan_safe(const product_rows *a, int i, const packed_vec *b, int length, int vectors,
                            vec *panel)
{
    const int rows = MICRO_ROWS(vectors), pairs = TILE_K / 2;
    const product_prefetch none = {.every = pairs};
    for (int e = i; e < i + PASS_ROWS && e < a->last; e += rows, panel += rows * vectors) {
        vec c[MAX_MICRO_ROWS][MAX_VECTORS] = {0};
        const char *at[MAX_MICRO_ROWS];
        product_row_pointers(a, e, rows, at);
        for (int k = 0; k < length; k++) {
            micro_kernel(at, false, sizeof(operand), b + k * pairs * vectors, pairs, vectors, true, &none, c);
            for (int r = 0; r < rows; r++)
                at[r] += a->step;
        }
        for (int r = 0; r < rows; r++)
            for (int m = 0; m < vectors; m++)
                panel[r * vectors + m] += c[r][m];
    }
}

FA_INLINE void product_add(const product_rows *a, int i, const packed_vec *b, int length, int vectors,
                           bool nan_safe, bool empty, const product_prefetch *prefetch, vec *panel)
{
    const bool whole = i + BLOCK_ROWS < a->last;
    if (nan_safe) {
        memset(panel, 0,
               empty ? (size_t)(whole ? PASS_ROWS : BLOCK_ROWS) * (size_t)vectors * sizeof(vec) : 0);
        add_nan_safe(a, i, b, length, vectors, panel);
        return;
    }
    prefetch_burst(prefetch, prefetch->data);
    finish_stores();
    if (empty)
        clear_sums(vectors, whole);
    else
        load_sums(panel, vectors, whole);
    multiply_blocks(a->data + i * a->row, a->row, a->step, b, length, vectors, whole);
    store_sums(panel, vectors, whole);
}

/* The unit's products with nothing else. */
static double measure_peak_rounds(int64_t rounds)
{
    static const uint8_t zeros[BLOCK_ROWS * FA_VECTOR_BYTES];
    begin_products();
    clear_sums(MAX_VECTORS, true);
    _tile_loadd(6, zeros, FA_VECTOR_BYTES);
    _tile_loadd(7, zeros, FA_VECTOR_BYTES);
    for (int64_t round = 0; round < rounds; round++) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_dpbf16ps(4, 6, 7);
        _tile_dpbf16ps(5, 6, 7);
    }
    end_products();
    return (double)rounds * 6 * BLOCK_ROWS * LANES * TILE_K * 2;
}

#endif

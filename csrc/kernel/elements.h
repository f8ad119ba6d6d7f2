/* Elements of any dtype and any stride, to and from vectors of `real`.
 *
 * Requires stored.h; provides loads, stores, gathers and transpositions of stored elements. */
#include "for_editors.h"

#ifndef FA_KERNEL_ELEMENTS_H
#define FA_KERNEL_ELEMENTS_H

#include "specialise.h"
#include "stored.h"

/* `count` elements of `size` bytes, `step` bytes apart, side by side. */
FA_INLINE void gather_bytes(const char *src, ptrdiff_t step, int count, int size, char *dst)
{
    if (size == 1) {
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
            dst[i] = src[i * step];
    } else if (size == 2) {
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
            memcpy(dst + 2 * i, src + i * step, 2);
    } else if (size == 4) {
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
            memcpy(dst + 4 * i, src + i * step, 4);
    } else {
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
            memcpy(dst + 8 * i, src + i * step, 8);
    }
}

/* Elements that lie so close are loaded as vectors, and shuffled. */
FA_INLINE bool is_close(ptrdiff_t step, int size)
{
    return step == size || step == -size || step == 2 * size || step == -2 * size;
}

/* LANES elements that are close to each other; nothing before the first or behind the last is read. */
FA_INLINE vec load_close(const char *src, ptrdiff_t step, fa_dtype dtype)
{
    const int size = element_size(dtype);
    const char *lowest = step < 0 ? src + (LANES - 1) * step : src;
    vec x = load_contiguous(lowest, dtype);
    if (step == 2 * size || step == -2 * size) {
        vec y = load_contiguous(lowest + (LANES - 1) * size, dtype);
        x = SHUFFLE(x, y, STEP_TWO);
    }
    return step < 0 ? SHUFFLE(x, x, REVERSED) : x;
}

/* `count` <= LANES elements `step` bytes apart; the lanes beyond are 0, and nothing there is read. */
FA_INLINE vec load_elements(const char *src, ptrdiff_t step, int count, fa_dtype dtype)
{
    const int size = element_size(dtype);
    if (step == size && count == LANES)
        return load_contiguous(src, dtype);
    if (count == LANES && is_close(step, size))
        return load_close(src, step, dtype);
    char elements[8 * LANES] = {0};
    gather_bytes(src, step, count, size, elements);
    return load_contiguous(elements, dtype);
}

/* The first `count` <= LANES lanes to elements `step` bytes apart; nothing else is written. */
FA_INLINE void store_elements(char *dst, ptrdiff_t step, int count, fa_dtype dtype, vec x)
{
    const int size = element_size(dtype);
    if (step == size && count == LANES) {
        store_contiguous(dst, dtype, x);
        return;
    }
    char elements[8 * LANES];
    store_contiguous(elements, dtype, x);
    for (int i = 0; i < count; i++)
        memcpy(dst + i * step, elements + i * size, (size_t)size);
}

FA_INLINE bool is_half(fa_dtype dtype)
{
    return fa_traits(dtype).is_half;
}

FA_INLINE void load_whole_transposed(char *const *rows, ptrdiff_t offset, fa_dtype dtype, vec x[LANES])
{
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++)
        x[j] = load_contiguous(rows[j] + offset, dtype);
    vec_transpose(x);
}

FA_INLINE void store_whole_transposed(char *const *rows, ptrdiff_t offset, fa_dtype dtype, vec x[LANES])
{
    vec_transpose(x);
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++)
        store_contiguous(rows[j] + offset, dtype, x[j]);
}

/* Whether LANES rows lie side by side, an element apart. */
FA_INLINE bool are_adjacent(char *const *rows, int size)
{
    bool adjacent = true;
    for (int j = 1; j < LANES; j++)
        adjacent &= rows[j] - rows[0] == j * size;
    return adjacent;
}

/* LANES rows of `count` <= LANES elements, transposed: x[i] holds element i of every row. Whole blocks of the
 * usual dtypes stay in registers. */
FA_INLINE void load_transposed(char *const *rows, ptrdiff_t offset, ptrdiff_t step, int count, fa_dtype dtype,
                               vec x[LANES])
{
    bool whole = step == element_size(dtype) && count == LANES;
    if (whole && dtype == FA_REAL_DTYPE) {
        load_whole_transposed(rows, offset, FA_REAL_DTYPE, x);
    } else if (whole && is_half(dtype)) {
        WITH_DTYPE(dtype, is_half, load_whole_transposed(rows, offset, DTYPE, x));
    } else if (are_adjacent(rows, element_size(dtype))) {
        for (int i = 0; i < count; i++)
            x[i] = load_contiguous(rows[0] + offset + i * step, dtype);
    } else if (is_close(step, element_size(dtype))) {
        for (int j = 0; j < LANES; j++)
            x[j] = load_elements(rows[j] + offset, step, count, dtype);
        vec_transpose(x);
    } else { /* all rows first: a vector that is read where its elements were just written waits */
        char elements[LANES][8 * LANES] = {0};
        for (int j = 0; j < LANES; j++)
            gather_bytes(rows[j] + offset, step, count, element_size(dtype), elements[j]);
        for (int j = 0; j < LANES; j++)
            x[j] = load_contiguous(elements[j], dtype);
        vec_transpose(x);
    }
}

/* The transpose of load_transposed, for `num_rows` <= LANES rows. */
FA_INLINE void store_transposed(char *const *rows, int num_rows, ptrdiff_t offset, ptrdiff_t step, int count,
                                fa_dtype dtype, vec x[LANES])
{
    bool whole = step == element_size(dtype) && count == LANES && num_rows == LANES;
    if (whole && dtype == FA_REAL_DTYPE) {
        store_whole_transposed(rows, offset, FA_REAL_DTYPE, x);
    } else if (whole && is_half(dtype)) {
        WITH_DTYPE(dtype, is_half, store_whole_transposed(rows, offset, DTYPE, x));
    } else if (num_rows == LANES && are_adjacent(rows, element_size(dtype))) {
        for (int i = 0; i < count; i++)
            store_contiguous(rows[0] + offset + i * step, dtype, x[i]);
    } else {
        vec y[LANES]; /* apart from x, which can then stay in registers above */
        memcpy(y, x, sizeof y);
        vec_transpose(y);
        for (int j = 0; j < num_rows; j++)
            store_elements(rows[j] + offset, step, count, dtype, y[j]);
    }
}

#endif

/* Elements of any dtype and any stride, to and from vectors of `real`.
 *
 * Requires vec.h; provides loads, stores, gathers and transpositions of stored elements. */
#include "for_editors.h"

#ifndef FA_KERNEL_ELEMENTS_H
#define FA_KERNEL_ELEMENTS_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "vec.h"

FA_INLINE int element_size(fa_dtype dtype)
{
    return dtype == FA_FLOAT64 ? 8 : dtype == FA_FLOAT32 ? 4 : dtype == FA_INT8 ? 1 : 2;
}

FA_INLINE float float_from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

FA_INLINE uint32_t bits_from_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

FA_INLINE float float_from_float16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) /* inf, NaN */
        return float_from_bits(sign | magnitude << 13 | 0x7f800000);
    if (magnitude < 0x400) /* subnormal; not as a float32, which would be taken for 0 */
        return float_from_bits(sign | bits_from_float((float)magnitude * 0x1p-24f));
    return float_from_bits(sign | ((magnitude << 13) + 0x38000000)); /* the exponents differ by 112 */
}

FA_INLINE uint16_t float16_from_float(float x)
{
    uint32_t bits = bits_from_float(x);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000) /* 65520 and more round to infinity */
        return sign | 0x7c00;
    if (magnitude < 0x38800000) /* below 2^-14: the sum's last bit is 2^-24, and the adder rounds */
        return sign | (uint16_t)(bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000);
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1); /* to nearest, ties to even */
    return sign | (uint16_t)((rounded - 0x38000000) >> 13);
}

FA_INLINE float float_from_bfloat16(uint16_t b)
{
    return float_from_bits((uint32_t)b << 16);
}

FA_INLINE uint16_t bfloat16_from_float(float x)
{
    uint32_t bits = bits_from_float(x);
    if (isnan(x))
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

FA_INLINE real load_element(const char *src, fa_dtype dtype)
{
    float f;
    double d;
    uint16_t h;
    switch (dtype) {
    case FA_FLOAT32:
        memcpy(&f, src, sizeof f);
        return (real)f;
    case FA_FLOAT64:
        memcpy(&d, src, sizeof d);
        if (FA_REAL_BYTES == 4 && isfinite(d)) /* a huge bias hides nothing, unless it is -inf */
            d = fmin(fmax(d, -FLT_MAX), FLT_MAX);
        return (real)d;
    case FA_FLOAT16:
        memcpy(&h, src, sizeof h);
        return (real)float_from_float16(h);
    case FA_INT8:
        return (real) * (const int8_t *)src;
    default:
        memcpy(&h, src, sizeof h);
        return (real)float_from_bfloat16(h);
    }
}

FA_INLINE void store_element(char *dst, fa_dtype dtype, real x)
{
    float f = (float)x;
    double d = (double)x;
    uint16_t h;
    switch (dtype) {
    case FA_FLOAT32:
        memcpy(dst, &f, sizeof f);
        break;
    case FA_FLOAT64:
        memcpy(dst, &d, sizeof d);
        break;
    case FA_FLOAT16:
        h = float16_from_float(f);
        memcpy(dst, &h, sizeof h);
        break;
    default:
        h = bfloat16_from_float(f);
        memcpy(dst, &h, sizeof h);
    }
}

#if FA_REAL_BYTES == 4
typedef uint16_t half_vec __attribute__((vector_size(FA_VECTOR_BYTES / 2)));
typedef uint16_t half_vec_unaligned __attribute__((vector_size(FA_VECTOR_BYTES / 2), aligned(1), may_alias));

#ifndef uvec_load_halves
FA_INLINE uvec uvec_load_halves(const void *src)
{
    return __builtin_convertvector(*(const half_vec_unaligned *)src, uvec);
}
#endif

FA_INLINE vec vec_load_bfloat16(const void *src)
{
    return (vec)(uvec_load_halves(src) << 16);
}

#ifndef vec_load_int8
FA_INLINE vec vec_load_int8(const void *src)
{
    typedef int8_t bytes_unaligned __attribute__((vector_size(LANES), aligned(1), may_alias));
    return __builtin_convertvector(*(const bytes_unaligned *)src, vec);
}
#endif

#ifndef vec_store_bfloat16
FA_INLINE void vec_store_bfloat16(void *dst, vec x)
{
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uvec quiet_nan = bits >> 16 | 0x40;
    vmask number = vec_equal(x, x);
    uvec halves = (uvec)vec_select(number, (vec)rounded, (vec)quiet_nan);
    *(half_vec_unaligned *)dst = __builtin_convertvector(halves, half_vec);
}
#endif

#ifndef vec_load_float16
FA_INLINE vec vec_load_float16(const void *src)
{
    vec x = {0};
    for (int i = 0; i < LANES; i++)
        x[i] = load_element((const char *)src + 2 * i, FA_FLOAT16);
    return x;
}

FA_INLINE void vec_store_float16(void *dst, vec x)
{
    for (int i = 0; i < LANES; i++)
        store_element((char *)dst + 2 * i, FA_FLOAT16, x[i]);
}
#endif
#endif

/* LANES contiguous elements. */
FA_INLINE vec load_contiguous(const char *src, fa_dtype dtype)
{
    if (dtype == FA_REAL_DTYPE)
        return vec_load(src);
#if FA_REAL_BYTES == 4
    if (dtype == FA_FLOAT16)
        return vec_load_float16(src);
    if (dtype == FA_BFLOAT16)
        return vec_load_bfloat16(src);
    if (dtype == FA_INT8)
        return vec_load_int8(src);
#endif
    vec x = {0};
    for (int i = 0; i < LANES; i++)
        x[i] = load_element(src + i * element_size(dtype), dtype);
    return x;
}

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
        x = __builtin_shufflevector(x, y, STEP_TWO_LANES);
    }
    return step < 0 ? __builtin_shufflevector(x, x, REVERSED_LANES) : x;
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

FA_INLINE void store_contiguous(char *dst, fa_dtype dtype, vec x)
{
    if (dtype == FA_REAL_DTYPE) {
        vec_store(dst, x);
        return;
    }
#if FA_REAL_BYTES == 4
    if (dtype == FA_FLOAT16) {
        vec_store_float16(dst, x);
        return;
    }
    if (dtype == FA_BFLOAT16) {
        vec_store_bfloat16(dst, x);
        return;
    }
#endif
    for (int i = 0; i < LANES; i++)
        store_element(dst + i * element_size(dtype), dtype, x[i]);
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

/* LANES rows of `count` <= LANES elements, transposed: x[i] holds element i of every row. Whole blocks
 * of the usual dtypes stay in registers. */
FA_INLINE void load_transposed(char *const *rows, ptrdiff_t offset, ptrdiff_t step, int count, fa_dtype dtype,
                               vec x[LANES])
{
    bool whole = step == element_size(dtype) && count == LANES;
    if (whole && dtype == FA_REAL_DTYPE) {
        load_whole_transposed(rows, offset, FA_REAL_DTYPE, x);
    } else if (whole && dtype == FA_FLOAT16) {
        load_whole_transposed(rows, offset, FA_FLOAT16, x);
    } else if (whole && dtype == FA_BFLOAT16) {
        load_whole_transposed(rows, offset, FA_BFLOAT16, x);
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
    } else if (whole && dtype == FA_FLOAT16) {
        store_whole_transposed(rows, offset, FA_FLOAT16, x);
    } else if (whole && dtype == FA_BFLOAT16) {
        store_whole_transposed(rows, offset, FA_BFLOAT16, x);
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

/* Vectors that hold a row of so many elements. */
FA_INLINE int vectors_of(int64_t columns)
{
    return (int)((columns + LANES - 1) / LANES);
}

/* Rows of keys or values in place, `array->row` bytes apart, with the scales of int8 (NULL: none). */
typedef struct {
    const char *data;
    const fa_array *array;
    const char *scale;
    ptrdiff_t scale_step;
} source_rows;

/* Of a row of keys or values that is packed, in vectors of `real` or of pairs of elements. */
FA_INLINE ptrdiff_t packed_row_bytes(int64_t head_dim)
{
    return (head_dim + LANES - 1) / LANES * FA_VECTOR_BYTES;
}

/* Whether rows lie side by side, an element apart, and what follows in a row lies far from it. */
FA_INLINE bool is_transposed(const fa_array *array)
{
    const int size = element_size(array->dtype);
    return array->row == size && !is_close(array->col, size);
}

/* Whether rows are gathered before they are packed: neither their elements nor the rows lie close. */
FA_INLINE bool is_scattered(const fa_array *array)
{
    return !is_close(array->col, element_size(array->dtype)) && !is_transposed(array);
}

/* Gathers `num_rows` rows into `to`, and describes them there. */
FA_INLINE source_rows gather_rows(const source_rows *src, int num_rows, int columns, fa_array *gathered,
                                  char *to)
{
    const int size = element_size(src->array->dtype);
    *gathered = (fa_array){.dtype = src->array->dtype, .row = (ptrdiff_t)columns * size, .col = size};
    for (int n = 0; n < num_rows; n++)
        gather_bytes(src->data + n * src->array->row, src->array->col, columns, size, to + n * gathered->row);
    return (source_rows){to, gathered, src->scale, src->scale_step};
}

/* pack_rows by blocks of LANES × LANES, which are transposed. */
FA_INLINE void pack_rows_transposed(const source_rows *src, int num_keys, int head_dim, char *packed)
{
    const fa_array *array = src->array;
    for (int n = 0; n < num_keys; n += LANES) {
        const int keys = num_keys - n < LANES ? num_keys - n : LANES;
        for (int d = 0; d < head_dim; d += LANES) {
            vec x[LANES];
            for (int j = 0; j < LANES; j++) {
                const char *column = src->data + n * array->row + (d + j) * array->col;
                x[j] =
                    d + j < head_dim ? load_elements(column, array->row, keys, array->dtype) : vec_splat(0);
            }
            vec_transpose(x);
            for (int i = 0; i < keys; i++)
                vec_store(packed + (n + i) * packed_row_bytes(head_dim) + d * (int)sizeof(real), x[i]);
        }
    }
}

/* pack_rows by elements `col` bytes apart. */
FA_INLINE void pack_rows_along(const source_rows *src, fa_dtype dtype, ptrdiff_t col, bool scaled,
                               int num_keys, int head_dim, char *packed)
{
    const int whole = head_dim / LANES * LANES;
    for (int n = 0; n < num_keys; n++, packed += packed_row_bytes(head_dim)) {
        const char *row = src->data + n * src->array->row;
        real scale = scaled ? load_element(src->scale + n * src->scale_step, FA_FLOAT32) : 1;
        for (int d = 0; d < whole; d += LANES) {
            vec x = load_elements(row + d * col, col, LANES, dtype);
            vec_store(packed + d * (int)sizeof(real), scaled ? x * scale : x);
        }
        if (whole < head_dim) {
            vec x = load_elements(row + whole * col, col, head_dim - whole, dtype);
            vec_store(packed + whole * (int)sizeof(real), scaled ? x * scale : x);
        }
    }
}

/* Widens `num_keys` rows into [n][d], and multiplies them by their scales. Of dtypes that are known here it
 * takes a third of the time. */
FA_INLINE void pack_rows(const source_rows *src, int num_keys, int head_dim, char *packed)
{
    const fa_array *array = src->array;
    const bool close = array->col == 2 && !src->scale;
    if (is_transposed(array) && !src->scale)
        pack_rows_transposed(src, num_keys, head_dim, packed);
    else if (close && array->dtype == FA_FLOAT16)
        pack_rows_along(src, FA_FLOAT16, 2, false, num_keys, head_dim, packed);
    else if (close && array->dtype == FA_BFLOAT16)
        pack_rows_along(src, FA_BFLOAT16, 2, false, num_keys, head_dim, packed);
    else
        pack_rows_along(src, array->dtype, array->col, src->scale, num_keys, head_dim, packed);
}

/* bfloat16 is upcast two vectors at a time: shifts and masks are cheaper than moving halves to lanes. So the
 * even elements come first, then the odd ones. */
FA_INLINE bool is_deinterleaved(fa_dtype dtype)
{
    return FA_REAL_BYTES == 4 && dtype == FA_BFLOAT16;
}

/* Whether a decode tile takes rows in place: they can be loaded in vectors, to their end. */
FA_INLINE bool is_vector_aligned(const fa_array *array, int64_t columns)
{
    const int at_once = is_deinterleaved(array->dtype) ? 2 * LANES : LANES;
    return array->col == element_size(array->dtype) && columns % at_once == 0;
}

/* Whether the vectors of a row, as read by a decode tile, are even elements and odd ones in turn. */
FA_INLINE bool reads_deinterleaved(const fa_array *array, int64_t columns)
{
    return is_deinterleaved(array->dtype) && is_vector_aligned(array, columns);
}

/* Vector i of a row. */
FA_INLINE vec load_nth(const char *row, fa_dtype dtype, int i)
{
    if (!is_deinterleaved(dtype))
        return load_contiguous(row + i * LANES * element_size(dtype), dtype);
    uvec two = (uvec)vec_load(row + i / 2 * FA_VECTOR_BYTES);
    if (i % 2 == 0)
        return (vec)(two << 16);
    return (vec)(two & 0xffff0000);
}

/* Two vectors in the order of elements -> even and odd elements. */
FA_INLINE void deinterleave(vec x[2])
{
    real elements[2 * LANES];
    memcpy(elements, x, sizeof elements);
    for (int i = 0; i < 2 * LANES; i++)
        x[i % 2][i / 2] = elements[i];
}

FA_INLINE void interleave(vec x[2])
{
    vec even = x[0], odd = x[1];
    x[0] = __builtin_shufflevector(even, odd, INTERLEAVE_LOW);
    x[1] = __builtin_shufflevector(even, odd, INTERLEAVE_HIGH);
}

#endif

/* Rows of keys and values: what they are in memory, how rows that cannot be read in place are packed, and how
 * a decode tile reads them in vectors.
 *
 * Requires elements.h; provides source_rows, gather_rows, pack_rows and load_nth. */
#include "for_editors.h"

#ifndef FA_KERNEL_PACK_H
#define FA_KERNEL_PACK_H

#include "elements.h"

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

/* Upcasts `num_keys` rows into [n][d], and multiplies them by their scales. Of dtypes that are known here it
 * takes a third of the time. */
FA_INLINE void pack_rows(const source_rows *src, int num_keys, int head_dim, char *packed)
{
    const fa_array *array = src->array;
    const bool is_dense_half = is_half(array->dtype) && array->col == 2 && !src->scale;
    if (is_transposed(array) && !src->scale)
        pack_rows_transposed(src, num_keys, head_dim, packed);
    else if (is_dense_half)
        WITH_DTYPE(array->dtype, is_half, pack_rows_along(src, DTYPE, 2, false, num_keys, head_dim, packed))
    else
        pack_rows_along(src, array->dtype, array->col, src->scale, num_keys, head_dim, packed);
}

/* bfloat16 is upcast two vectors at a time: the even elements come first, then the odd ones. */
FA_INLINE bool is_deinterleaved(fa_dtype dtype)
{
    return FA_REAL_BYTES == 4 && fa_traits(dtype).is_deinterleaved;
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
    x[0] = SHUFFLE(even, odd, INTERLEAVE_LOW);
    x[1] = SHUFFLE(even, odd, INTERLEAVE_HIGH);
}

#endif

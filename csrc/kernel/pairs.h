/* bfloat16 in pairs along the reduction axis, whose products are summed in float32: queries and probabilities
 * are packed as lanes of pairs; a decode tile reads keys as the pairs that they are, and interleaves values
 * by two keys.
 *
 * The instruction set's file defines `dot_pairs(uvec a, uvec b, vec c)` and `round_pairs`.
 *
 * Requires dot_pairs and round_pairs of the instruction set; provides the packing of pairs and their
 * products. */
#include "for_editors_bf16dot.h"

#ifndef FA_KERNEL_PAIRS_H
#define FA_KERNEL_PAIRS_H

#include "pack.h"

typedef uint32_t operand;
typedef uvec packed_vec;

#define PRODUCTS_IN_BFLOAT16 1

FA_INLINE int64_t query_panel_rows(int64_t head_dim)
{
    return (head_dim + 2 * LANES - 1) / (2 * LANES) * LANES;
}

#ifndef dot_operand
FA_INLINE vec dot_operand(operand a, uvec b, vec c)
{
    return dot_pairs(a - (uvec){0}, b, c);
}
#endif

FA_INLINE vec multiply_add(operand a, packed_vec b, vec c)
{
    return dot_operand(a, b, c);
}

/* The same, but where half of b is -0, that half of a is taken as 0: it is masked, be it NaN. */
FA_INLINE vec multiply_add_nan_safe(operand a, packed_vec b, vec c)
{
    halves visible = (halves)((halves)b != 0x8000);
    return dot_pairs((a - (uvec){0}) & (uvec)visible, b, c);
}

/* A whole vector of each of two keys, in pairs. */
FA_INLINE void interleave_keys(const char *first, const char *second, packed_vec pairs[2])
{
    halves a = (halves)vec_load(first), b = (halves)vec_load(second);
    vec_store(pairs, (vec)SHUFFLE_HALVES(a, b, INTERLEAVE_LOW));
    vec_store(pairs + 1, (vec)SHUFFLE_HALVES(a, b, INTERLEAVE_HIGH));
}

/* `count` halves, as lanes; LANES of them at most, and 0 beyond, where nothing is read. */
FA_INLINE uvec load_halves(const char *src, ptrdiff_t col, int count)
{
    if (col == 2 && count >= LANES)
        return uvec_load_halves(src);
    if (count >= LANES && is_close(col, 2))
        return (uvec)load_close(src, col, FA_BFLOAT16) >> 16;
    uint16_t halves[LANES] = {0};
    if (count > 0)
        gather_bytes(src, col, count < LANES ? count : LANES, 2, (char *)halves);
    return uvec_load_halves(halves);
}

/* Lanes (low, high). */
FA_INLINE uvec make_pairs(uvec low, uvec high)
{
    return low | high << 16;
}

/* Up to LANES pairs from `count` elements; 0 beyond them, where nothing is read. */
FA_INLINE uvec load_pairs(const char *src, ptrdiff_t col, int count)
{
    if (col == 2 && count >= 2 * LANES)
        return (uvec)vec_load(src);
    uvec x = load_halves(src, col, count), y = load_halves(src + LANES * col, col, count - LANES);
    return make_pairs(SHUFFLE(x, y, EVEN), SHUFFLE(x, y, ODD));
}

/* Pairs times `sign`: 1, -1, or 0, and then what is not finite becomes NaN. */
FA_INLINE uvec times_sign(uvec pairs, real sign)
{
    if (sign == 0)
        return (uvec)((halves)(((halves)pairs & 0x7f80) == 0x7f80) & 0x7fc0);
    const uint32_t flip = sign < 0 ? 0x80008000 : 0;
    return pairs ^ flip;
}

/* x[i]: elements 2i and 2i + 1 of `count` <= LANES rows that lie side by side, in pairs. 0 beyond them, and
 * beyond the `columns` elements of a row. */
FA_INLINE void load_pairs_across(const char *src, ptrdiff_t row, ptrdiff_t col, int count, int columns,
                                 vec x[LANES])
{
    for (int i = 0; i < LANES; i++, src += 2 * col)
        x[i] = (vec)make_pairs(load_halves(src, row, 2 * i < columns ? count : 0),
                               load_halves(src + col, row, 2 * i + 1 < columns ? count : 0));
}

FA_INLINE void load_whole_pairs_transposed(char *const *rows, ptrdiff_t offset, vec x[LANES])
{
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++)
        x[j] = vec_load(rows[j] + offset);
    vec_transpose(x);
}

/* x[i]: elements 2i and 2i + 1 of LANES rows, from element d of `head_dim` on. */
FA_INLINE void load_pairs_transposed(char *const *rows, ptrdiff_t col, int d, int head_dim, vec x[LANES])
{
    if (col == 2 && d + 2 * LANES <= head_dim) {
        load_whole_pairs_transposed(rows, d * col, x);
    } else if (are_adjacent(rows, 2)) {
        load_pairs_across(rows[0] + d * col, 2, col, LANES, head_dim - d, x);
    } else {
        for (int j = 0; j < LANES; j++)
            x[j] = (vec)load_pairs(rows[j] + d * col, col, head_dim - d);
        vec_transpose(x);
    }
}

/* Row j of the tile at rows[j], as panel[d / 2][m] lanes of pairs, times `sign` (1, -1 or 0). Whole vectors:
 * it ends in zeros. */
FA_INLINE void pack_query(char *const *rows, ptrdiff_t col, fa_dtype dtype, int head_dim, int vectors,
                          real sign, packed_vec *query)
{
    (void)dtype;
    for (int m = 0; m < vectors; m++) {
        for (int d = 0; d < head_dim; d += 2 * LANES) {
            vec x[LANES];
            load_pairs_transposed(rows + m * LANES, col, d, head_dim, x);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++)
                query[(d / 2 + j) * vectors + m] = times_sign((uvec)x[j], sign);
        }
    }
}

/* Of a decode tile, whose keys are read in place: a row of queries times `sign`, in pairs that end in
 * zeros, in vectors that are `step` apart. */
FA_INLINE void pack_decode_query(const char *row, const fa_problem *p, real sign, int step, packed_vec *query)
{
    for (int d = 0; d < p->head_dim; d += 2 * LANES, query += step)
        *query = times_sign(load_pairs(row + d * p->query.col, p->query.col, (int)p->head_dim - d), sign);
}

FA_INLINE int key_vectors(int64_t head_dim)
{
    return vectors_of((head_dim + 1) / 2);
}

FA_INLINE int vectors_per_load(fa_dtype dtype)
{
    (void)dtype;
    return 1;
}

FA_INLINE int key_vector_bytes(fa_dtype dtype)
{
    (void)dtype;
    return FA_VECTOR_BYTES;
}

FA_INLINE packed_vec load_key_vector(const char *src, fa_dtype dtype, int i)
{
    (void)dtype;
    return (uvec)vec_load(src + i * FA_VECTOR_BYTES);
}

FA_INLINE vec multiply_lanes(packed_vec a, packed_vec b, vec c)
{
    return dot_pairs(a, b, c);
}

/* Rows n and n + 1 become row n / 2 of pairs, in place: its lanes are read before they are written.
 * num_keys is even. */
FA_INLINE const packed_vec *pack_probabilities(vec *scores, int num_keys, int vectors)
{
    for (int n = 0; n < num_keys; n += 2)
        for (int m = 0; m < vectors; m++)
            scores[n / 2 * vectors + m] =
                (vec)round_pairs(scores[n * vectors + m], scores[(n + 1) * vectors + m]);
    return (const packed_vec *)scores;
}

/* Of a decode tile: keys whose values are multiplied at once. */
#define VALUE_KEYS 2

/* The panel of a decode tile as operands, [key / 2][row], in place: pairs of the probabilities of two keys.
 */
FA_INLINE const operand *pack_decode_probabilities(vec *scores, int panel_rows, int rows_pow2)
{
    for (int v = 0; v < panel_rows; v += 2) {
        const vec a = scores[v], b = v + 1 < panel_rows ? scores[v + 1] : vec_splat(0);
        vec even, odd; /* keys */
        if (rows_pow2 == 1) {
            even = SHUFFLE(a, b, EVEN);
            odd = SHUFFLE(a, b, ODD);
        } else if (rows_pow2 == 2) {
            even = SHUFFLE(a, b, EVEN_TWOS);
            odd = SHUFFLE(a, b, ODD_TWOS);
        } else if (rows_pow2 == 4) {
            even = SHUFFLE(a, b, EVEN_FOURS);
            odd = SHUFFLE(a, b, ODD_FOURS);
        } else {
            even = SHUFFLE(a, b, EVEN_EIGHTS);
            odd = SHUFFLE(a, b, ODD_EIGHTS);
        }
        scores[v / 2] = (vec)round_pairs(even, odd);
    }
    return (const operand *)scores;
}

/* `width` vectors of the values of two keys. */
FA_INLINE void load_values(const char *first, const char *second, fa_dtype dtype, int width, packed_vec v[8])
{
    (void)dtype;
    if (width == 1)
        v[0] = make_pairs(uvec_load_halves(first), uvec_load_halves(second));
#pragma GCC unroll 4
    for (int i = 0; i + 1 < width; i += 2)
        interleave_keys(first + i / 2 * FA_VECTOR_BYTES, second + i / 2 * FA_VECTOR_BYTES, v + i);
}

/* Values of two keys; 0 where a key's probability is -0: it is hidden, be its value NaN. */
FA_INLINE packed_vec mask_values(operand probabilities, packed_vec v)
{
    const uint32_t low = (probabilities & 0xffff) == 0x8000 ? 0 : 0xffff;
    const uint32_t high = probabilities >> 16 == 0x8000 ? 0 : 0xffff0000;
    return v & (low | high);
}

/* Where pairs of keys are packed: 2 * LANES elements from d on of row n at data + n * row + d / (2 * LANES) *
 * step. */
typedef struct {
    char *data;
    ptrdiff_t row, step;
} packed_pairs;

FA_INLINE char *pairs_at(const packed_pairs *to, int n, int d)
{
    return to->data + n * to->row + d / (2 * LANES) * to->step;
}

/* Vectors of a row one after another. */
FA_INLINE packed_pairs pairs_in_rows(char *packed, int64_t head_dim)
{
    return (packed_pairs){packed, key_vectors(head_dim) * FA_VECTOR_BYTES, FA_VECTOR_BYTES};
}

FA_INLINE void clear_pairs(const packed_pairs *to, int begin, int end, int head_dim)
{
    for (int n = begin; n < end; n++)
        for (int d = 0; d < head_dim; d += 2 * LANES)
            vec_store(pairs_at(to, n, d), vec_splat(0));
}

/* pack_pairs of rows that lie side by side: blocks of them are transposed. */
FA_INLINE void pack_pairs_transposed(const source_rows *src, int first, int num_keys, int head_dim,
                                     const packed_pairs *to)
{
    const fa_array *key = src->array;
    for (int n = 0; n < num_keys; n += LANES) {
        const int keys = num_keys - n < LANES ? num_keys - n : LANES;
        for (int d = 0; d < head_dim; d += 2 * LANES) {
            vec x[LANES];
            load_pairs_across(src->data + n * key->row + d * key->col, key->row, key->col, keys, head_dim - d,
                              x);
            vec_transpose(x);
            for (int i = 0; i < keys; i++)
                vec_store(pairs_at(to, first + n + i, d), x[i]);
        }
    }
}

/* Rows that are packed prefetch those so far behind them: packing waits for memory alone. Behind the last row
 * they are mostly the next block's; if not, it does no harm. */
#define PACKED_PREFETCH_ROWS 32

/* Keys as rows [first, first + num_keys), which end in zeros. */
FA_INLINE void pack_pairs(const source_rows *src, int first, int num_keys, int head_dim,
                          const packed_pairs *to)
{
    const fa_array *key = src->array;
    if (is_transposed(key)) {
        pack_pairs_transposed(src, first, num_keys, head_dim, to);
        return;
    }
    for (int n = 0; n < num_keys; n++)
        for (int d = 0; d < head_dim; d += 2 * LANES) {
            const char *at = src->data + n * key->row + d * key->col;
            __builtin_prefetch(at + PACKED_PREFETCH_ROWS * key->row, 0, 2);
            vec_store(pairs_at(to, first + n, d), (vec)load_pairs(at, key->col, head_dim - d));
        }
}

/* For a decode tile. */
FA_INLINE void pack_decode_rows(const source_rows *src, int num_keys, int head_dim, char *packed)
{
    const packed_pairs to = pairs_in_rows(packed, head_dim);
    pack_pairs(src, 0, num_keys, head_dim, &to);
}

FA_INLINE ptrdiff_t packed_decode_row_bytes(int64_t head_dim)
{
    return key_vectors(head_dim) * FA_VECTOR_BYTES;
}

#endif

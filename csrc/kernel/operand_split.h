/* Products of float32 and float16 in the tile unit, which multiplies bfloat16: a number is split into parts,
 * leading bits first, that are bfloat16 and whose sum it is, and of the products of parts those are summed
 * that show in the result:
 *
 *     x = x0 + x1 + x2,  x y = Σ xi yj  for i + j < 3: six products, float32's 24 bits
 *     x = x0 + x1,       x y = Σ xi yj  for i + j < 2: three, float16's 11 bits
 *
 * What is stored in fewer bits than it meets has fewer parts: bfloat16 one, float16 two. Each part is packed
 * as tiles, and the parts lie one behind the other.
 *
 * The unit takes parts and products below 2^-126 for 0. What keys and queries lose by that is at most 2^-126
 * times what they meet, which is bounded: a key or a query that has a number of MAX_MAGNITUDE or more is
 * packed LARGE_DIVISOR times smaller, and its scores are multiplied by that. Each by itself: the product of
 * two that are smaller only for their company would be below 2^-126, and their score 0.
 * Values lose 2^-126 likewise; to pack them larger and probabilities smaller would not change their products.
 * Infinity splits into itself and zeros, which gives NaN where it meets a part that is 0: such scores are
 * replaced by those of the leading parts.
 *
 * Requires decode_operand_real.h; provides operand, TILE_K and the packing of keys, values and queries. */
#include "for_editors_split.h"

#ifndef FA_KERNEL_OPERAND_H
#define FA_KERNEL_OPERAND_H

#include "decode_operand_real.h"

#define TILE_K 32
/* Groups of few rows are another kernel's. */
#define DECODE_ROWS 0
#define MAX_PARTS 3
/* Probabilities are read several times, while the next ones are stored. */
#define PROBABILITY_PANELS 2

/* Of packed keys and values, beside the tiles in L2. */
#define MAX_SUPERBLOCK_BYTES (1 << 19)

/* Sums of 512 products of numbers below MAX_MAGNITUDE do not overflow. */
#define MAX_MAGNITUDE 0x1p59f
#define LARGE_DIVISOR 0x1p69f

/* Of keys or queries: each was multiplied by its own factor, and this one is not 1 where some of them is not;
 * and whether there is an infinite one. */
typedef struct {
    float factor;
    bool has_infinity;
} packed_range;

/* With the factors of keys or queries behind it. */
#define PACKED_RANGE_BYTES (FA_VECTOR_BYTES + FA_KEY_BLOCK * (ptrdiff_t)sizeof(float))

FA_INLINE float *range_factors(const packed_range *range)
{
    return (float *)((char *)range + FA_VECTOR_BYTES);
}

FA_INLINE void begin_range(packed_range *range, int count)
{
    *range = (packed_range){1, false};
    for (int i = 0; i < count; i++)
        range_factors(range)[i] = 1;
}

/* Parts of what is stored in this dtype. */
FA_INLINE int parts_of(fa_dtype dtype)
{
    switch (dtype) {
    case FA_BFLOAT16:
        return 1;
    case FA_FLOAT16:
        return 2;
    case FA_FLOAT32:
    case FA_FLOAT64:
    case FA_INT8: /* times its scale */
        return MAX_PARTS;
    }
    __builtin_unreachable();
}

/* --- sizes -------------------------------------------------------------------------------------- */

FA_INLINE bool key_is_operand(const fa_array *key, int64_t head_dim)
{
    (void)key, (void)head_dim;
    return false;
}

#include "operand_tiles.h"

FA_INLINE int64_t query_panel_rows(int64_t head_dim)
{
    return MAX_PARTS * query_part_rows(head_dim) + 2;
}

/* In the last rows of the panel. */
FA_INLINE packed_range *query_range(packed_vec *query, int64_t head_dim)
{
    return (packed_range *)(query + MAX_PARTS * query_part_rows(head_dim) * MAX_VECTORS);
}

FA_INLINE packed_range *key_range_at(const char *packed, int64_t head_dim)
{
    return (packed_range *)(packed + MAX_PARTS * key_part_bytes(head_dim));
}

/* --- parts -------------------------------------------------------------------------------------- */

/* x without its leading part; 0 for infinity and NaN. */
FA_INLINE vec without_leading_part(vec x)
{
    const vec rest = x - (vec)((uvec)x & 0xffff0000);
    return vec_select(vec_equal(rest, rest), rest, vec_splat(0));
}

/* Lanes (low, high), a vector for each part. */
FA_INLINE void store_parts(vec low, vec high, int parts, char *to, ptrdiff_t part_bytes)
{
#pragma GCC unroll 3
    for (int i = 0; i < parts; i++, to += part_bytes) {
        vec_store(to, (vec)((uvec)low >> 16 | ((uvec)high & 0xffff0000)));
        low = without_leading_part(low);
        high = without_leading_part(high);
    }
}

/* The bits of each lane's largest magnitude so far. */
FA_INLINE ivec larger_magnitude(ivec largest, vec x)
{
    return ivec_max(largest, (ivec)x & 0x7fffffff);
}

FA_INLINE lane_int magnitude_bits(float x)
{
    lane_int bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

FA_INLINE bool any_reaches(ivec largest, float limit)
{
    const ivec reaches = (ivec)(largest >= magnitude_bits(limit));
    return vmask_any(ivec_test(reaches, reaches));
}

/* Of numbers some of which are large. */
typedef struct {
    ivec largest, infinite; /* bits of the largest finite magnitude; lanes that have seen infinity */
} magnitudes;

FA_INLINE void look_at(magnitudes *seen, vec x)
{
    const ivec bits = (ivec)x & 0x7fffffff, infinity = ivec_splat(0x7f800000);
    seen->largest = ivec_max(seen->largest, bits & (ivec)(bits < infinity));
    seen->infinite |= (ivec)(bits == infinity);
}

FA_INLINE bool any_infinite(const magnitudes *seen)
{
    return vmask_any(ivec_test(seen->infinite, seen->infinite));
}

/* --- keys and values ---------------------------------------------------------------------------- */

/* Rows of at most TILE_K floats, which end in zeros. */
typedef struct {
    const char *data;
    ptrdiff_t row;
    bool one_vector;
} float_rows;

/* Elements [d, d + TILE_K) of `count` rows from n on; in place, or upcast into `room`. */
FA_INLINE float_rows load_rows(const source_rows *src, int n, int count, int d, int head_dim, char *room)
{
    const fa_array *array = src->array;
    const source_rows part = {src->data + n * array->row + d * array->col, array,
                              src->scale ? src->scale + n * src->scale_step : NULL, src->scale_step};
    const int columns = head_dim - d < TILE_K ? head_dim - d : TILE_K;
    if (array->dtype == FA_REAL_DTYPE && array->col == sizeof(real) && columns % LANES == 0)
        return (float_rows){part.data, array->row, columns <= LANES};
    pack_rows(&part, count, columns, room);
    return (float_rows){room, packed_row_bytes(columns), columns <= LANES};
}

FA_INLINE vec load_half_row(const float_rows *rows, int n, int half)
{
    return half > 0 && rows->one_vector ? vec_splat(0)
                                        : vec_load(rows->data + n * rows->row + half * FA_VECTOR_BYTES);
}

/* The block's keys times their factors, and the bits of their largest magnitude. A pair is two elements LANES
 * apart, as in pack_query. */
static ivec pack_key_parts(const source_rows *src, int lead, int num_keys, int head_dim, const float *factors,
                           char *packed)
{
    _Alignas(64) char room[FA_KEY_BLOCK * 2 * FA_VECTOR_BYTES];
    const int parts = parts_of(src->array->dtype), end = (lead + num_keys + TILE_K - 1) / TILE_K * TILE_K;
    const ptrdiff_t part_bytes = key_part_bytes(head_dim);
    ivec largest = {0};
    for (int d = 0; d < head_dim; d += TILE_K, packed += packed_key_step()) {
        const float_rows rows = load_rows(src, 0, num_keys, d, head_dim, room);
        for (int n = 0; n < end; n++) {
            vec low = vec_splat(0), high = vec_splat(0);
            if (n >= lead && n < lead + num_keys) {
                low = load_half_row(&rows, n - lead, 0) * factors[n];
                high = load_half_row(&rows, n - lead, 1) * factors[n];
            }
            largest = larger_magnitude(larger_magnitude(largest, low), high);
            store_parts(low, high, parts, packed + n * FA_VECTOR_BYTES, part_bytes);
        }
    }
    return largest;
}

static void find_key_range(const source_rows *src, int lead, int num_keys, int head_dim, packed_range *range)
{
    _Alignas(64) char room[FA_KEY_BLOCK * 2 * FA_VECTOR_BYTES];
    for (int d = 0; d < head_dim; d += TILE_K) {
        const float_rows rows = load_rows(src, 0, num_keys, d, head_dim, room);
        for (int n = 0; n < num_keys; n++) {
            magnitudes seen = {{0}, {0}};
            look_at(&seen, load_half_row(&rows, n, 0));
            look_at(&seen, load_half_row(&rows, n, 1));
            if (any_reaches(seen.largest, MAX_MAGNITUDE))
                range->factor = range_factors(range)[lead + n] = 1 / LARGE_DIVISOR;
            range->has_infinity |= any_infinite(&seen);
        }
    }
}

/* A block of keys, of which the first `lead` ones and those behind num_keys are missing: they are 0. */
FA_INLINE void pack_key(const source_rows *src, int lead, int num_keys, int head_dim, char *packed)
{
    packed_range *range = key_range_at(packed, head_dim);
    begin_range(range, FA_KEY_BLOCK);
    const ivec largest = pack_key_parts(src, lead, num_keys, head_dim, range_factors(range), packed);
    if (!any_reaches(largest, MAX_MAGNITUDE))
        return;
    find_key_range(src, lead, num_keys, head_dim, range);
    if (range->factor != 1)
        pack_key_parts(src, lead, num_keys, head_dim, range_factors(range), packed);
}

/* The same, but a NaN whose leading part would be infinity: as after every operation, that part is NaN. */
FA_INLINE vec quiet(vec x)
{
    return x + vec_splat(0);
}

/* TILE_K keys from n on, of which those outside [0, num_keys) are missing, and LANES columns from e on:
 * transposed to rows of TILE_K keys. */
FA_INLINE void pack_value_columns(const float_rows *rows, int begin, int end, int half, int parts,
                                  ptrdiff_t part_bytes, char *packed)
{
    vec even[LANES], odd[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const int n = 2 * i;
        even[i] = n >= begin && n < end ? quiet(load_half_row(rows, n - begin, half)) : vec_splat(0);
        odd[i] =
            n + 1 >= begin && n + 1 < end ? quiet(load_half_row(rows, n + 1 - begin, half)) : vec_splat(0);
    }
    vec_transpose(even);
    vec_transpose(odd);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        store_parts(even[i], odd[i], parts, packed + i * FA_VECTOR_BYTES, part_bytes);
}

/* A block of values, likewise. */
FA_INLINE void pack_value(const source_rows *src, int lead, int num_keys, int head_dim_v, char *packed)
{
    _Alignas(64) char room[TILE_K * 2 * FA_VECTOR_BYTES];
    const int parts = parts_of(src->array->dtype);
    const ptrdiff_t part_bytes = value_part_bytes(head_dim_v);
    for (int n = -lead; n < num_keys; n += TILE_K, packed += packed_value_bytes(head_dim_v)) {
        const int first = n < 0 ? 0 : n, last = n + TILE_K < num_keys ? n + TILE_K : num_keys;
        for (int e = 0; e < head_dim_v; e += TILE_K) {
            const float_rows rows =
                load_rows(src, first, last > first ? last - first : 0, e, head_dim_v, room);
            for (int half = 0; half < 2 && e + half * LANES < head_dim_v; half++) {
                char *to = packed + (e + half * LANES) * FA_VECTOR_BYTES;
                if (last - n == TILE_K && first == n)
                    pack_value_columns(&rows, 0, TILE_K, half, parts, part_bytes, to);
                else
                    pack_value_columns(&rows, first - n, last - n, half, parts, part_bytes, to);
            }
        }
    }
}

/* --- queries ------------------------------------------------------------------------------------ */

/* x[i]: element d + i of LANES rows, times their factors; 0 beyond head_dim. */
FA_INLINE void load_columns(char *const *rows, ptrdiff_t col, fa_dtype dtype, int d, int head_dim, vec factor,
                            vec x[LANES])
{
    const int count = head_dim - d < LANES ? head_dim - d : LANES;
    if (count > 0)
        load_transposed(rows, d * col, col, count, dtype, x);
    for (int i = 0; i < LANES; i++)
        x[i] = i < count ? x[i] * factor : vec_splat(0);
}

static ivec pack_query_parts(char *const *rows, ptrdiff_t col, fa_dtype dtype, int head_dim, int vectors,
                             real sign, const float *factors, packed_vec *query)
{
    const int parts = parts_of(dtype);
    const ptrdiff_t part_bytes = query_part_rows(head_dim) * vectors * FA_VECTOR_BYTES;
    ivec largest = {0};
    for (int m = 0; m < vectors; m++) {
        const vec factor = vec_load(factors + m * LANES) * sign;
        for (int d = 0; d < head_dim; d += TILE_K) {
            vec low[LANES], high[LANES];
            load_columns(rows + m * LANES, col, dtype, d, head_dim, factor, low);
            load_columns(rows + m * LANES, col, dtype, d + LANES, head_dim, factor, high);
            for (int i = 0; i < LANES; i++) {
                largest = larger_magnitude(larger_magnitude(largest, low[i]), high[i]);
                store_parts(low[i], high[i], parts, (char *)(query + (d / 2 + i) * vectors + m), part_bytes);
            }
        }
    }
    return largest;
}

static void find_query_range(char *const *rows, ptrdiff_t col, fa_dtype dtype, int head_dim, int vectors,
                             real sign, packed_range *range)
{
    for (int m = 0; m < vectors; m++) {
        magnitudes seen = {{0}, {0}};
        for (int d = 0; d < head_dim; d += LANES) {
            vec x[LANES];
            load_columns(rows + m * LANES, col, dtype, d, head_dim, vec_splat(sign), x);
            for (int i = 0; i < LANES; i++)
                look_at(&seen, x[i]);
        }
        range->has_infinity |= any_infinite(&seen);
        for (int j = 0; j < LANES; j++)
            if (seen.largest[j] >= magnitude_bits(MAX_MAGNITUDE))
                range->factor = range_factors(range)[m * LANES + j] = 1 / LARGE_DIVISOR;
    }
}

/* Row j of the tile at rows[j], times `sign` (1, -1 or 0): [part][head_dim / 2][m] lanes of pairs, of
 * elements LANES apart. */
static void pack_query(char *const *rows, ptrdiff_t col, fa_dtype dtype, int head_dim, int vectors, real sign,
                       packed_vec *query)
{
    packed_range *range = query_range(query, head_dim);
    const float *factors = range_factors(range);
    begin_range(range, vectors * LANES);
    const ivec largest = pack_query_parts(rows, col, dtype, head_dim, vectors, sign, factors, query);
    if (!any_reaches(largest, MAX_MAGNITUDE))
        return;
    find_query_range(rows, col, dtype, head_dim, vectors, sign, range);
    if (range->factor != 1)
        pack_query_parts(rows, col, dtype, head_dim, vectors, sign, factors, query);
}

#endif

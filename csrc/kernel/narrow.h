/* Products of a narrow tile. A few query rows leave next to no arithmetic: what counts is to read K and V
 * once, at the speed of memory, in vectors as they lie. So here lanes run along the head dims, and a score is
 * a sum over lanes. A row of the score panel holds LANES / narrow keys, key by key, `narrow` rows each. */
#ifndef FA_KERNEL_NARROW_H
#define FA_KERNEL_NARROW_H

#include "lookahead.h"

/* A tile reads in turn the keys of some blocks, their values, the keys of the next blocks, and so on, run by
 * run. While it reads a row, it asks line by line for the one that comes this far behind. */
#define AHEAD_BYTES 16384

/* Whether lines are asked for at all. A row that is read alone leaves its lines to the CPU, which sees where
 * they come from (Zen 4: 8 % faster than asking into L1 in float32, 24 % in bfloat16); not so where bytes are
 * widened, or the CPU is one that wants to be asked (fa_asks_into_l1). */
FA_INLINE bool asks_for_lines(fa_dtype dtype, int rows, bool into_l1)
{
    return rows > 1 || dtype == FA_INT8 || into_l1;
}

FA_INLINE void ask_for_line(const char *line, bool into_l1)
{
    if (into_l1)
        __builtin_prefetch(line, 0, 3);
    else
        __builtin_prefetch(line, 0, 2);
}

/* The rows to ask for while the n-th of the first run, which lies at `row`, and those behind it are read,
 * `distance` rows ahead: the first of these, if no others are to come. For some rows at once: in a loop over
 * rows this would cost as much as their arithmetic. */
FA_INLINE row_run rows_to_ask_for(const row_run *reading, int distance, int n, const char *row)
{
    n += distance;
#pragma GCC unroll 3
    for (int i = 0; i < READING_AHEAD; i++) {
        const row_run *run = &reading[i];
        if (n < run->count)
            return (row_run){run->data + n * run->row, run->row, run->count - n};
        n -= run->count;
    }
    return (row_run){row, 0, KEY_BLOCK};
}

/* Of a block that was staged, and thus read before, it is a whole block. */
FA_INLINE int rows_ahead(const row_run *reading, bool staged)
{
    const int64_t most = reading[0].count + reading[1].count;
    const ptrdiff_t row = reading[0].row;
    if (staged)
        return reading[0].count;
    return row > 0 ? (int)min_i64(AHEAD_BYTES / row, most) : (int)most;
}

/* Keys that are read side by side, a vector of each at a time: for some rows all those of a vector of scores,
 * so that a vector of queries, once there, serves them all. For one row memory serves keys one by one best;
 * but where bytes are widened, arithmetic is dearer than reading. */
FA_INLINE int keys_abreast(fa_dtype dtype, int rows)
{
    if (rows > 1)
        return LANES / rows;
    return dtype == FA_INT8 ? 4 : 1;
}

/* sums[g * rows + r] += lane by lane products of key g and row r, of the vectors that are read at once, at
 * `offset` in a row of keys. In registers: a load beside each multiply-add would be one too many. */
FA_INLINE void multiply_keys(const char *const *key, ptrdiff_t offset, fa_dtype dtype, const panel *query,
                             int rows, vec *sums)
{
#pragma GCC unroll 2
    for (int i = 0; i < keys_at_once(dtype); i++, query += rows) {
        panel q[NARROW_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            q[r] = (panel)vec_in_register((vec)query[r]);
#pragma GCC unroll 16
        for (int g = 0; g < keys_abreast(dtype, rows); g++) {
            panel k = load_key_vector(key[g] + offset, dtype, i);
            if (rows > 1)
                k = (panel)vec_in_register((vec)k);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                sums[g * rows + r] = multiply_lanes(k, q[r], sums[g * rows + r]);
        }
    }
}

/* Rows to ask for while others are read: line by line, `next_key` and `next_line` bytes apart. */
typedef struct {
    const char *data;
    ptrdiff_t row, next_key, next_line;
    bool into_l1; /* not L2 */
} line_requests;

/* Of keys abreast that touch, lines one after another, as memory serves them best. */
FA_INLINE line_requests spread_requests(const row_run *run, ptrdiff_t row_bytes, int abreast, bool into_l1)
{
    if (run->row == row_bytes)
        return (line_requests){run->data, run->row, 64, 64 * abreast, into_l1};
    return (line_requests){run->data, run->row, run->row, 64, into_l1};
}

/* sums[g * rows + r] = Σ_d key[g][d] query[r][d], lane by lane. Asks for as many keys from `soon` on. */
FA_INLINE void dot_keys_abreast(const char *const *key, fa_dtype dtype, const panel *query, int vectors,
                                int rows, const line_requests *requests, const char *soon, vec *sums)
{
    const int at_once = keys_at_once(dtype), step = key_vector_bytes(dtype);
    const int abreast = keys_abreast(dtype, rows);
#pragma GCC unroll 16
    for (int i = 0; i < abreast * rows; i++)
        sums[i] = vec_splat(0);
#pragma GCC unroll 4
    for (int d = 0; d < vectors; d += at_once) {
        if (d * step % 64 == 0 && asks_for_lines(dtype, rows, requests->into_l1)) {
#pragma GCC unroll 16
            for (int g = 0; g < abreast; g++)
                ask_for_line(soon + d * step / 64 * requests->next_line + g * requests->next_key,
                             requests->into_l1);
        }
        multiply_keys(key, d * step, dtype, query + d * rows, rows, sums);
    }
}

/* Lane j * rows + r: Σ_d key[n + j][d] query[r][d]. */
FA_INLINE vec dot_keys(const key_range *range, const operand_block *key, int64_t n, fa_dtype dtype,
                       const panel *query, int vectors, int rows, const line_requests *soon)
{
    const int abreast = keys_abreast(dtype, rows);
    vec sums[LANES];
#pragma GCC unroll 1
    for (int j = 0; j < LANES / rows; j += abreast) {
        const char *k[LANES];
        vec abreast_sums[LANES]; /* in registers, unlike those that a loop goes through */
        point_at_keys(range, key, n + j, abreast, k);
        dot_keys_abreast(k, dtype, query, vectors, rows, soon, soon->data + j * soon->row, abreast_sums);
#pragma GCC unroll 16
        for (int i = 0; i < abreast * rows; i++)
            sums[j * rows + i] = abreast_sums[i];
    }
    return vec_sums(sums);
}

/* Vectors of a row of values that are summed at once, for all rows: in half the registers at most. */
#define VALUE_SUMS (FA_VECTOR_BYTES / 4)
#define VALUE_VECTORS(rows) (VALUE_SUMS / (rows) < 8 ? VALUE_SUMS / (rows) : 8)

/* Values whose rows are summed before others are read: so few that a second pass over them, for more of their
 * columns, finds them in L1, and that what is asked for ahead is not asked for too late. */
#define VALUES_ABREAST 32

/* out[r][i] (+)= Σ_n p[n][r] value[n][i] over the vectors i of a row, and the keys [lead, num_keys). */
typedef struct {
    const char *value; /* of key 0, which cannot be read if lead is 1 */
    ptrdiff_t row;
    const operand *p; /* [key / VALUE_KEYS][row] */
    int lead, num_keys;
    int vectors;
    bool fresh; /* out is not there yet */
    vec *out;
    const row_run *reading;
    int distance;
    bool into_l1; /* lines are asked for into L1, not L2 */
} value_product;

/* Values of which a part is asked for, `width` vectors of each. */
FA_INLINE void ask_for_values(const char *soon, ptrdiff_t next, ptrdiff_t vector_bytes, int width,
                              bool into_l1)
{
#pragma GCC unroll 2
    for (int k = 0; k < VALUE_KEYS; k++)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            if (i * vector_bytes % 64 == 0)
                ask_for_line(soon + k * next + i * vector_bytes, into_l1);
}

/* sums[r][i] += p[r] value[i], of the keys that are multiplied at once. visible_only: where p is -0 the key
 * is hidden from the row, and its value, be it NaN, adds nothing. */
FA_INLINE void add_value(const panel v[8], const operand *p, int rows, int width, bool visible_only,
                         vec sums[8][8])
{
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            sums[r][i] = multiply_add(p[r], visible_only ? visible_values(p[r], v[i]) : v[i], sums[r][i]);
}

/* `width` vectors of all keys, from `first` on. Of rows that touch, as many bytes are asked for one
 * after another, as memory serves them best. */
FA_INLINE void add_values(const value_product *a, int first, fa_dtype dtype, int rows, int width,
                          bool visible_only)
{
    vec sums[8][8];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            sums[r][i] = vec_splat(0);
    const ptrdiff_t vector_bytes = LANES * element_size(dtype), offset = first * vector_bytes;
    const char *value = a->value + offset;
    const operand *p = a->p;
    for (int n = 0; n < a->num_keys;) {
        const row_run run = rows_to_ask_for(a->reading, a->distance, n, a->value + a->lead * a->row);
        const int end = n + rows_left(n, run.count, a->num_keys);
        const bool touch = run.row == a->vectors * vector_bytes;
        const char *soon = run.data + (touch ? (end - n) * offset : offset);
        const ptrdiff_t next = touch ? width * vector_bytes : run.row;
        for (; n < end; n += VALUE_KEYS, value += VALUE_KEYS * a->row, soon += VALUE_KEYS * next, p += rows) {
            /* of keys that may not be read, the other one, which their probability hides */
            const char *even = n < a->lead ? value + a->row : value;
            const char *odd = n + 1 < a->num_keys ? value + a->row : value;
            panel v[8];
            if (asks_for_lines(dtype, rows, a->into_l1))
                ask_for_values(soon, next, vector_bytes, width, a->into_l1);
            load_values(even, odd, dtype, width, v);
#pragma GCC unroll 8
            for (int i = 0; i < width && rows > 1; i++) /* as for keys */
                v[i] = (panel)vec_in_register((vec)v[i]);
            add_value(v, p, rows, width, visible_only, sums);
        }
    }
    vec *out = a->out + first;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++, out += a->vectors)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++)
            out[i] = a->fresh ? sums[r][i] : out[i] + sums[r][i];
}

FA_INLINE void add_rows_of_values(const value_product *a, fa_dtype dtype, int rows, bool visible_only)
{
    int i = 0;
    for (; i + VALUE_VECTORS(rows) <= a->vectors; i += VALUE_VECTORS(rows))
        add_values(a, i, dtype, rows, VALUE_VECTORS(rows), visible_only);
    for (; VALUE_VECTORS(rows) > 4 && i + 4 <= a->vectors; i += 4)
        add_values(a, i, dtype, rows, 4, visible_only);
    for (; i + 2 <= a->vectors; i += 2)
        add_values(a, i, dtype, rows, 2, visible_only);
    if (i < a->vectors)
        add_values(a, i, dtype, rows, 1, visible_only);
}

/* Whether keys and values are of the dtype `narrow`, and come to this kernel. */
FA_INLINE bool is_widened(fa_dtype dtype, fa_dtype narrow)
{
    return FA_REAL_BYTES == 4 && dtype == narrow;
}

/* One inlined copy for each number of rows and each dtype of keys and values. */
FA_INLINE void add_values_of(const value_product *a, fa_dtype dtype, int rows, bool visible_only)
{
    if (visible_only)
        add_rows_of_values(a, dtype, rows, true);
    else if (PRODUCTS_IN_BFLOAT16)
        add_rows_of_values(a, FA_BFLOAT16, rows, false);
    else if (is_widened(dtype, FA_FLOAT16))
        add_rows_of_values(a, FA_FLOAT16, rows, false);
    else if (is_widened(dtype, FA_BFLOAT16))
        add_rows_of_values(a, FA_BFLOAT16, rows, false);
    else if (is_widened(dtype, FA_INT8))
        add_rows_of_values(a, FA_INT8, rows, false);
    else
        add_rows_of_values(a, FA_REAL_DTYPE, rows, false);
}

static void add_values_any(const value_product *a, fa_dtype dtype, int rows, bool visible_only)
{
    if (NARROW_ROWS >= 8 && rows == 8)
        add_values_of(a, dtype, 8, visible_only);
    else if (NARROW_ROWS >= 4 && rows == 4)
        add_values_of(a, dtype, 4, visible_only);
    else if (NARROW_ROWS >= 2 && rows == 2)
        add_values_of(a, dtype, 2, visible_only);
    else
        add_values_of(a, dtype, 1, visible_only);
}

/* The scales of the range's keys; of those that may not be read, the nearest one's. */
static void load_scales(const key_range *range, const operand_block *block, real *scales)
{
    const int lead = (int)(range->key_lo - range->first), end = (int)(range->key_hi - range->first);
    const char *src = block->scale + (range->key_lo - block->first) * block->scale_step;
    if (block->scale_step == sizeof(real) && FA_REAL_DTYPE == FA_FLOAT32) {
        memcpy(scales + lead, src, (size_t)(end - lead) * sizeof(real));
    } else {
        for (int n = lead; n < end; n++, src += block->scale_step)
            scales[n] = load_element(src, FA_FLOAT32);
    }
    for (int n = 0; n < lead; n++)
        scales[n] = scales[lead];
    for (int n = end; n < num_keys(range); n++)
        scales[n] = scales[end - 1];
}

/* Multiplies the panel's rows by the scales of their keys, or of their values. */
static void multiply_by_scales(const tile *t, const key_range *range, const operand_block *block, vec *panel)
{
    real scales[NARROW_KEYS + LANES] = {0};
    load_scales(range, block, scales);
    for (int v = 0; v < num_keys(range) >> t->key_shift; v++) {
        vec x = vec_load(scales + (v << t->key_shift));
        for (int r = 1; r < t->narrow; r *= 2) /* each key's, side by side for its rows */
            x = __builtin_shufflevector(x, x, INTERLEAVE_LOW);
        panel[v] *= x;
    }
}

/* Scores of all keys of the range, as multiply_query_key. */
FA_INLINE void dot_range(const fa_problem *p, const tile *t, const key_range *range, const operand_block *key,
                         const lookahead *ahead, fa_dtype dtype, int rows, real scale, vec *scores)
{
    const int keys = LANES / rows, vectors = key_vectors(p->head_dim);
    const ptrdiff_t row_bytes = vectors * key_vector_bytes(dtype);
    const int distance = rows_ahead(ahead->reading, !lies_in_vectors(&p->key, p->head_dim));
    const bool into_l1 = fa_asks_into_l1();
    prefetch_queries(p, ahead, 0, ahead->query_rows);
    if (ahead->key_scale) {
        prefetch_rows(ahead->key_scale, p->key_scale.row, sizeof(float), ahead->key_rows);
        prefetch_rows(ahead->value_scale, p->value_scale.row, sizeof(float), ahead->key_rows);
    }
    for (int n = 0; n < num_keys(range);) {
        const row_run run =
            rows_to_ask_for(ahead->reading, distance, n, key->data + (range->key_lo - key->first) * key->row);
        line_requests soon = spread_requests(&run, row_bytes, keys_abreast(dtype, rows), into_l1);
        const int end = n + rows_left(n, run.count, num_keys(range));
        for (; n < end; n += keys, soon.data += keys * soon.row)
            scores[n / keys] =
                dot_keys(range, key, range->first + n, dtype, t->query, vectors, rows, &soon) * scale;
    }
}

FA_INLINE void dot_range_of(const fa_problem *p, const tile *t, const key_range *range,
                            const operand_block *key, const lookahead *ahead, int rows, real scale,
                            vec *scores)
{
    if (PRODUCTS_IN_BFLOAT16)
        dot_range(p, t, range, key, ahead, FA_BFLOAT16, rows, scale, scores);
    else if (is_widened(key->dtype, FA_FLOAT16))
        dot_range(p, t, range, key, ahead, FA_FLOAT16, rows, scale, scores);
    else if (is_widened(key->dtype, FA_BFLOAT16))
        dot_range(p, t, range, key, ahead, FA_BFLOAT16, rows, scale, scores);
    else if (is_widened(key->dtype, FA_INT8))
        dot_range(p, t, range, key, ahead, FA_INT8, rows, scale, scores);
    else
        dot_range(p, t, range, key, ahead, FA_REAL_DTYPE, rows, scale, scores);
}

static void multiply_narrow_query_key(const fa_problem *p, const tile *t, const key_range *range,
                                      const operand_block *key, const lookahead *ahead, real scale,
                                      vec *scores)
{
    if (NARROW_ROWS >= 8 && t->narrow == 8)
        dot_range_of(p, t, range, key, ahead, 8, scale, scores);
    else if (NARROW_ROWS >= 4 && t->narrow == 4)
        dot_range_of(p, t, range, key, ahead, 4, scale, scores);
    else if (NARROW_ROWS >= 2 && t->narrow == 2)
        dot_range_of(p, t, range, key, ahead, 2, scale, scores);
    else
        dot_range_of(p, t, range, key, ahead, 1, scale, scores);
    if (key->scale)
        multiply_by_scales(t, range, key, scores);
}

/* out (+)= probabilities · V over the keys of the range, the first of the runs that are read. */
static void multiply_narrow_value(const fa_problem *p, const tile *t, const key_range *range,
                                  const operand_block *value, vec *probabilities, const row_run *reading,
                                  bool visible_only)
{
    if (value->scale)
        multiply_by_scales(t, range, value, probabilities);
    const operand *p_of_rows =
        pack_narrow_probabilities(probabilities, panel_rows(t, range, true), t->narrow);
    value_product product = {
        .row = value->row,
        .vectors = vectors_of(p->head_dim_v),
        .fresh = t->fresh,
        .out = t->out,
        .reading = reading,
        .distance = rows_ahead(reading, !lies_in_vectors(&p->value, p->head_dim_v)),
        .into_l1 = fa_asks_into_l1(),
    };
    for (int64_t n = range->key_lo, end; n < range->key_hi; n = end) {
        end = min_i64((n / VALUES_ABREAST + 1) * VALUES_ABREAST, range->key_hi);
        const int64_t first = n / VALUE_KEYS * VALUE_KEYS;
        product.value = value->data + (first - value->first) * value->row;
        product.p = p_of_rows + (first - range->first) / VALUE_KEYS * t->narrow;
        product.lead = (int)(n - first);
        product.num_keys = (int)(end - first);
        add_values_any(&product, value->dtype, t->narrow, visible_only);
        product.distance += product.num_keys;
        product.fresh = false;
    }
}

#endif

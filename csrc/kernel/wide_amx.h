/* Products of a tile whose lanes are query rows, in the tile unit (AMX): its registers 0 to 5 hold sums, 2 ×
 * 3 blocks of 16 rows by LANES lanes; 6 holds 16 rows of operands, 7 a block of the panel.
 *
 * Budget: 16 cycles for each of the 6 products of a step, 8 for each of the 8 loads beside them. */
#ifndef FA_KERNEL_WIDE_H
#define FA_KERNEL_WIDE_H

#include <stdatomic.h>

#include "prefetch.h"

#define BLOCK_ROWS 16
#define PASS_ROWS (2 * BLOCK_ROWS)

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

/* All that a pass asks for, before it. */
FA_INLINE void prefetch_nth(const block_prefetch *all, int n)
{
    const product_prefetch prefetch = nth_prefetch(all, n, 1);
    prefetch_burst(&prefetch, prefetch.data);
}

/* scores[r][m] = scale Σ_d K[first + r][d] Q[m][d], and each lane's largest; whole passes, as keys are
 * packed. */
FA_INLINE void multiply_query_key(const fa_problem *p, const tile *t, const key_range *range,
                                  const operand_block *key, const prefetch_plan *plan, real scale,
                                  int vectors, vec *scores, vec block_max[MAX_VECTORS])
{
    const int length = (int)((p->head_dim + TILE_K - 1) / TILE_K);
    const bool modified = p->mask.data || p->bias.data;
    const int share = share_of_step(t->rows, num_keys(range), PASS_ROWS);
    const block_prefetch keys =
        spread_prefetch(plan->key, &p->key, p->head_dim, plan->key_rows, PASS_ROWS, 1);
    finish_stores();
    for (int r = 0; r < num_keys(range); r += PASS_ROWS) {
        prefetch_nth(&keys, r / PASS_ROWS);
        prefetch_queries(p, plan, r, PASS_ROWS);
        if (modified)
            prefetch_score_mods(p, t, range->key_hi, r / PASS_ROWS * share, share, t->rows);
        clear_sums(vectors, true);
        multiply_blocks(key->data + (range->first + r - key->first) * key->row, key->row, FA_VECTOR_BYTES,
                        t->query, length, vectors, true);
        store_sums(scores + r * vectors, vectors, true);
    }
    for (int i = 0; scale != 1 && i < num_keys(range) * vectors; i++)
        scores[i] *= scale;
    find_block_max(scores, (int)(range->key_hi - range->first), vectors, block_max);
}

/* Values that are hidden from some rows only, pair by pair: the unit multiplies them all. */
FA_INLINE void multiply_value_nan_safe(const char *base, ptrdiff_t row, int head_dim_v, const packed_vec *b,
                                       int length, int vectors, vec *out)
{
    const int rows = MICRO_ROWS(vectors), pairs = TILE_K / 2;
    const product_prefetch none = {.every = pairs};
    for (int e = 0; e < head_dim_v; e += rows) {
        const char *a[MAX_MICRO_ROWS];
        vec c[MAX_MICRO_ROWS][MAX_VECTORS] = {0};
        for (int k = 0; k < length; k++) {
            for (int i = 0; i < rows; i++)
                a[i] = base + k * row + min_i64(e + i, head_dim_v - 1) * FA_VECTOR_BYTES;
            product(a, false, sizeof(operand), b + k * pairs * vectors, pairs, vectors, true, &none, c);
        }
        for (int i = 0; i < rows; i++)
            for (int m = 0; m < vectors; m++)
                out[(e + i) * vectors + m] += c[i][m];
    }
}

/* out[e][m] += Σ_r V[first + r][e] p[r][m] */
FA_INLINE void multiply_value(const fa_problem *p, const tile *t, const key_range *range,
                              const operand_block *value, const packed_vec *probabilities,
                              const prefetch_plan *plan, int vectors, bool nan_safe)
{
    const char *base = value->data + (range->first / TILE_K - value->first) * value->row;
    const int length = num_keys(range) / TILE_K;
    if (nan_safe) {
        if (t->empty)
            memset(t->out, 0, out_bytes(p, TILE_ROWS));
        multiply_value_nan_safe(base, value->row, (int)p->head_dim_v, probabilities, length, vectors, t->out);
        return;
    }
    const block_prefetch values = spread_prefetch(plan->value, &p->value, p->head_dim_v, plan->key_rows,
                                                  share_of_step(plan->key_rows, p->head_dim_v, PASS_ROWS), 1);
    const int results = share_of_step(plan->out_rows, p->head_dim_v, PASS_ROWS);
    finish_stores();
    for (int e = 0; e < p->head_dim_v; e += PASS_ROWS) {
        const bool whole = e + BLOCK_ROWS < p->head_dim_v;
        vec *out = t->out + e * vectors;
        prefetch_nth(&values, e / PASS_ROWS);
        prefetch_out(p, t, plan, e / PASS_ROWS, results);
        if (t->empty)
            clear_sums(vectors, whole);
        else
            load_sums(out, vectors, whole);
        multiply_blocks(base + e * FA_VECTOR_BYTES, FA_VECTOR_BYTES, value->row, probabilities, length,
                        vectors, whole);
        store_sums(out, vectors, whole);
    }
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

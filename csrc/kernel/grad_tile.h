/* A tile's part in the backward pass: what its rows' gradients are made of, and the gradients of its queries.
 *
 * Of a row, with scores s = scale q·k (and what modifies them), probabilities p = e^(s - lse), and dP = dO ·
 * V,
 *
 *     delta = Σ_e dO[e] O[e] - dlse,   dS = p (dP - delta),   dQ = scale Σ_n dS[n] K[n],
 *
 * so that lse and out of the forward pass stand for all that other keys contribute (Dao, "FlashAttention-2",
 * 2023; dlse moves every score by its probability).
 *
 * Requires grad_products_fma.h or grad_products_amx.h; provides grad_tile, its beginning and its end. */
#include "for_editors.h"

#ifndef FA_KERNEL_GRAD_TILE_H
#define FA_KERNEL_GRAD_TILE_H

#if IS_PIPELINED
#include "grad_products_amx.h"
#else
#include "grad_products_fma.h"
#endif

/* The arrays of one batch item and kv head, as item_arrays has them. */
typedef struct {
    char *grad_out, *grad_lse, *grad_query, *grad_key, *grad_value, *delta;
} grad_arrays;

static grad_arrays locate_gradients(const fa_problem *p, const fa_work_item *item)
{
    const fa_gradients *g = p->gradients;
    return (grad_arrays){
        .grad_out = at_queries(&g->grad_out, p, item),
        .grad_lse = at_queries(&g->grad_lse, p, item),
        .grad_query = at_queries(&g->grad_query, p, item),
        .grad_key = at_keys(&g->grad_key, p, item),
        .grad_value = at_keys(&g->grad_value, p, item),
        .delta = at_queries(&g->delta, p, item),
    };
}

/* Beside a `tile`. */
typedef struct {
    vec lse[MAX_VECTORS];      /* of its rows, in units of the scores */
    vec lse_rest[MAX_VECTORS]; /* what was lost when that was rounded, in units of log2 */
    vec delta[MAX_VECTORS];
    bool is_finite; /* its queries and gradients of out; and no lse is NaN */
    bool empty;     /* grad_query is not there, and stands for 0 */
    char *grad_out_row[TILE_ROWS];
    packed_vec *grad_out; /* as the tile's `query` */
    vec *grad_query;      /* [head_dim][vectors] */
} grad_tile;

/* Rows of the dtype that most have, without gaps, have loops of their own: at the tile unit's speed it shows.
 */
#define USUAL_DTYPE (PRODUCTS_IN_BFLOAT16 ? FA_BFLOAT16 : FA_REAL_DTYPE)

FA_INLINE bool is_usual(ptrdiff_t col, fa_dtype dtype)
{
    return dtype == USUAL_DTYPE && col == element_size(USUAL_DTYPE);
}

/* Σ x - x over the columns of a row: 0, or NaN if one of them is not finite. */
FA_INLINE vec zeros_of_elements(const char *row, ptrdiff_t col, fa_dtype dtype, int64_t columns)
{
    vec zeros = {0};
    for (int64_t e = 0; e < columns; e += LANES) {
        const vec x = load_elements(row + e * col, col, (int)min_i64(LANES, columns - e), dtype);
        zeros += x - x;
    }
    return zeros;
}

static vec zeros_of_row(const char *row, ptrdiff_t col, fa_dtype dtype, int64_t columns)
{
    return is_usual(col, dtype) ? zeros_of_elements(row, element_size(USUAL_DTYPE), USUAL_DTYPE, columns)
                                : zeros_of_elements(row, col, dtype, columns);
}

/* Σ_e a[e] b[e]; 0 where b is 0: the out of a row that sees no key, whatever its gradient holds. */
FA_INLINE vec dot_elements(const char *a, ptrdiff_t a_col, fa_dtype a_dtype, const char *b, ptrdiff_t b_col,
                           fa_dtype b_dtype, int64_t columns)
{
    vec sums = {0};
    for (int64_t e = 0; e < columns; e += LANES) {
        const int count = (int)min_i64(LANES, columns - e);
        const vec x = load_elements(a + e * a_col, a_col, count, a_dtype);
        const vec y = load_elements(b + e * b_col, b_col, count, b_dtype);
        sums += vec_select(vec_equal(y, vec_splat(0)), y, x * y);
    }
    return sums;
}

static double dot_rows(const char *a, const fa_array *of_a, const char *b, const fa_array *of_b,
                       int64_t columns)
{
    const ptrdiff_t size = element_size(USUAL_DTYPE);
    const vec sums = is_usual(of_a->col, of_a->dtype) && is_usual(of_b->col, of_b->dtype)
                         ? dot_elements(a, size, USUAL_DTYPE, b, size, USUAL_DTYPE, columns)
                         : dot_elements(a, of_a->col, of_a->dtype, b, of_b->col, of_b->dtype, columns);
    double sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += sums[i];
    return sum;
}

/* lse, rounded. A tiny scale takes none of it beyond what `real` holds: the rest makes up for that. */
FA_INLINE real in_score_units(const fa_problem *p, double lse)
{
    const double max_finite = FA_REAL_BYTES == 4 ? 1e38 : 1e308, x = lse / deferred_scale(p);
    return (real)(isinf(lse) ? x : x > max_finite ? max_finite : x < -max_finite ? -max_finite : x);
}

/* What sums of dS are multiplied by: the scale that the scores have, finite in `real`. */
FA_INLINE real gradient_scale(const fa_problem *p)
{
    return (real)copysign(scale_magnitude(p), p->scale);
}

/* Of row j, of its rows' lse and delta. */
static void load_row_terms(const fa_problem *p, const item_arrays *a, const grad_arrays *ga, tile *t, int j,
                           grad_tile *g)
{
    const fa_gradients *gradients = p->gradients;
    const char *lse_at = a->lse + t->head[j] * p->lse.head + t->row[j] * p->lse.row;
    double lse = load_element(lse_at, p->lse.dtype);
    double delta = dot_rows(g->grad_out_row[j], &gradients->grad_out, t->out_row[j], &p->out, p->head_dim_v);
    if (ga->grad_lse)
        delta -= load_element(ga->grad_lse + t->head[j] * gradients->grad_lse.head +
                                  t->row[j] * gradients->grad_lse.row,
                              gradients->grad_lse.dtype);
    /* Of a row that sees no key p is 0, whatever its scores. */
    if (lse == -INFINITY)
        lse = INFINITY;
    const double rounded = in_score_units(p, lse);
    g->lse[j / LANES][j % LANES] = (real)rounded;
    g->lse_rest[j / LANES][j % LANES] =
        isinf(lse) ? 0 : (real)(fma(rounded, deferred_scale(p), -lse) * LOG2E);
    g->delta[j / LANES][j % LANES] = (real)delta;
    if (ga->delta)
        store_element(ga->delta + t->head[j] * gradients->delta.head + t->row[j] * gradients->delta.row,
                      gradients->delta.dtype, (real)delta);
}

/* The lanes beyond the last row repeat it; their p are 0, for sums over lanes meet them. */
static void load_rows_terms(const fa_problem *p, const item_arrays *a, const grad_arrays *ga, tile *t,
                            grad_tile *g)
{
    for (int m = 0; m < t->vectors; m++) {
        g->lse[m] = vec_splat((real)INFINITY);
        g->lse_rest[m] = g->delta[m] = vec_splat(0);
    }
    vec zeros = {0};
    for (int j = 0; j < t->rows; j++) {
        load_row_terms(p, a, ga, t, j, g);
        zeros += zeros_of_row(t->query_row[j], p->query.col, p->query.dtype, p->head_dim);
        zeros += zeros_of_row(g->grad_out_row[j], p->gradients->grad_out.col, p->gradients->grad_out.dtype,
                              p->head_dim_v);
    }
    for (int m = 0; m < t->vectors; m++)
        zeros += g->lse_rest[m] - g->lse_rest[m];
    g->is_finite = are_finite(zeros);
}

/* What the key blocks need of tile i, whose rows are located. */
static void begin_grad_tile(const fa_problem *p, const item_arrays *a, const grad_arrays *ga, int i, tile *t,
                            grad_tile *g, packed_vec *query_rows, packed_vec *grad_out_rows)
{
    const fa_array *grad_out = &p->gradients->grad_out;
    point_at_rows(t, ga->grad_out, grad_out, g->grad_out_row);
    load_rows_terms(p, a, ga, t, g);
    pack_tile(p, t);
    pack_query(g->grad_out_row, grad_out->col, grad_out->dtype, (int)p->head_dim_v, t->vectors, 1,
               g->grad_out);
    pack_row_panels(t->query_row, p->query.col, p->query.dtype, p->head_dim, t->vectors, i, query_rows);
    pack_row_panels(g->grad_out_row, grad_out->col, grad_out->dtype, p->head_dim_v, t->vectors, i,
                    grad_out_rows);
    t->empty = false;
    g->empty = true;
}

/* Stores the gradients of the tile's queries. */
static void finish_grad_tile(const fa_problem *p, const grad_arrays *ga, const tile *t, const grad_tile *g)
{
    const fa_array *to = &p->gradients->grad_query;
    char *rows[TILE_ROWS];
    point_at_rows(t, ga->grad_query, to, rows);
    const vec scale = vec_splat(g->empty ? 0 : gradient_scale(p));
    for (int m = 0; m < t->vectors && rows_of_vector(t, m) > 0; m++)
        for (int d = 0; d < p->head_dim; d += LANES) {
            const int count = (int)min_i64(LANES, p->head_dim - d);
            vec x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = g->empty ? scale : g->grad_query[(d + (i < count ? i : 0)) * t->vectors + m] * scale;
            store_transposed(rows + m * LANES, rows_of_vector(t, m), d * to->col, to->col, count, to->dtype,
                             x);
        }
}

#endif

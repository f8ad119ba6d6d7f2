/* The product by the tile unit (AMX), 16 rows by 16 lanes by 32 elements at a time, with a softmax beside it.
 *
 * A product takes 16 cycles, and runs beside vector operations if they are interleaved finely: a piece of the
 * softmax follows each. A store takes 16 slots of a port that the unit needs too: it follows products of
 * other sums, the last one of a panel those of the next panel (`pending`). Granite Rapids: 71 % of the unit's
 * peak with stores right behind their products, 100 % so.
 *
 * Requires tile_unit.h's CPU or its emulation, MAX_VECTORS = 2; provides panel products. */
#include "for_editors_amx.h"

#ifndef FA_KERNEL_PRODUCT_AMX_H
#define FA_KERNEL_PRODUCT_AMX_H

#include "softmax_stream.h"
#include "tile_unit.h"

_Static_assert(MAX_VECTORS == 2, "panels are of two vectors");

/* Whether wide tiles are attended by attend_pipeline.h. */
#define IS_PIPELINED 1
/* In parts it would be slower than by multiply-adds. */
#define HAS_BACKWARD (MAX_PARTS == 1)

/* To pack a block of values takes a third of a unit's time, once for all tiles. Errors of sums over many keys
 * do not show beside those of probabilities in bfloat16. */
#define MAX_TILES 16
#define ITEMS_PER_THREAD 4
#define SPLITS_MANY_ROWS false
#define PANEL_ROW ((ptrdiff_t)(MAX_VECTORS * sizeof(vec)))
#define PANEL_BLOCK (TMM_ROWS * MAX_VECTORS) /* vectors of 16 rows */

/* Between two calls a signal handler may have made one that released the unit. */
FA_INLINE void begin_products(void)
{
    tmm_configure(&whole_registers);
}

/* Else the operating system would save the registers at every switch. */
FA_INLINE void end_products(void)
{
    tmm_release();
}

/* The products of parts that a product consists of, each of which has an index in common with the one before:
 * its tiles are there already. Of numbers that are one part, just one. */
typedef struct {
    int count;
    struct {
        uint8_t a, b;
    } of[6];
} part_products;

/* exact: of two parts each, the product of the lesser ones, too. */
FA_INLINE part_products list_part_products(int a_parts, int b_parts, bool exact)
{
    static const uint8_t order[][2] = {{1, 1}, {1, 0}, {2, 0}, {0, 0}, {0, 1}, {0, 2}};
    part_products list = {0};
    for (int i = 0; i < 6; i++) {
        const int a = order[i][0], b = order[i][1];
        if (a < a_parts && b < b_parts && (a + b < a_parts || a + b < b_parts || exact)) {
            list.of[list.count].a = (uint8_t)a;
            list.of[list.count++].b = (uint8_t)b;
        }
    }
    return list;
}

static const part_products one_part = {1, {{0, 0}}};

/* A panel of sums, C = or += A · B. Numbers in parts: the sum over the products of parts. 16-row blocks of
 * A's rows, B's rows and C's. */
typedef struct {
    const char *a;
    ptrdiff_t a_row, a_step; /* bytes between rows, and between steps of 32 elements */
    const packed_vec *b;     /* [step][16][2] */
    vec *c;                  /* [16-row block][16][2] */
    int blocks, steps;
    bool empty; /* C is not there yet */
    const part_products *parts;
    ptrdiff_t a_part, b_part; /* from a part of A to the next in bytes, of B in vectors */
} panel_product;

FA_INLINE int count_dots(const panel_product *x)
{
    return x->blocks * x->steps * MAX_VECTORS * x->parts->count;
}

/* Where register 1 belongs. */
typedef struct {
    vec *at;
    vec *nowhere; /* room for a register that belongs nowhere */
} pending_store;

FA_INLINE void finish_pending(pending_store *pending)
{
    tmm_store(1, pending->at, PANEL_ROW);
    pending->at = pending->nowhere;
}

FA_INLINE void start_sum(int t, const vec *c, bool empty)
{
    if (empty)
        tmm_zero(t);
    else
        tmm_load(t, c, PANEL_ROW);
}

/* Two steps: B stays in registers 4 to 7, A passes through 2 and 3, sums are 0 and 1. */
FA_INLINE void multiply_two_steps(const panel_product *x, pending_store *pending, softmax_stream *f,
                                  bool exact_sums, softmax_pace pace)
{
    const char *a = x->a;
    vec *c = x->c;
    tmm_load(4, x->b, PANEL_ROW);
    tmm_load(5, x->b + PANEL_BLOCK, PANEL_ROW);
    tmm_load(6, x->b + 1, PANEL_ROW);
    tmm_load(7, x->b + PANEL_BLOCK + 1, PANEL_ROW);
    for (int i = 0; i < x->blocks; i++, a += TMM_ROWS * x->a_row, c += PANEL_BLOCK) {
        tmm_load_stream(2, a, x->a_row);
        start_sum(0, c, x->empty);
        tmm_dot(0, 2, 4);
        soften_beside(f, exact_sums, pace, 0);
        tmm_store(1, pending->at, PANEL_ROW);
        tmm_load_stream(3, a + x->a_step, x->a_row);
        tmm_dot(0, 3, 5);
        soften_beside(f, exact_sums, pace, 1);
        pending->at = c + 1;
        start_sum(1, c + 1, x->empty);
        tmm_dot(1, 2, 6);
        soften_beside(f, exact_sums, pace, 2);
        tmm_dot(1, 3, 7);
        soften_beside(f, exact_sums, pace, 3);
        tmm_store(0, c, PANEL_ROW);
    }
}

/* Any number of steps, two blocks of rows at a time: sums are 0 to 3 (block, vector: 0 0, 0 1, 1 0, 1 1), A
 * is 4 and 5, B 6 and 7. An odd last block comes with one more, whose sums go to spare rows. */
FA_INLINE void multiply_steps(const panel_product *x, pending_store *pending, softmax_stream *f,
                              bool exact_sums, softmax_pace pace)
{
    const char *rows = x->a;
    vec *c = x->c;
    for (int i = 0; i < x->blocks; i += 2, rows += 2 * TMM_ROWS * x->a_row, c += 2 * PANEL_BLOCK) {
        const char *a = rows;
        const packed_vec *b = x->b;
        start_sum(0, c, x->empty);
        start_sum(2, c + PANEL_BLOCK, x->empty);
        start_sum(3, c + PANEL_BLOCK + 1, x->empty);
        for (int k = 0; k < x->steps; k++, a += x->a_step, b += PANEL_BLOCK) {
            tmm_load_stream(4, a, x->a_row);
            tmm_load(6, b, PANEL_ROW);
            tmm_dot(0, 4, 6);
            soften_beside(f, exact_sums, pace, 0);
            if (k == 0) {
                tmm_store(1, pending->at, PANEL_ROW);
                pending->at = c + 1;
                start_sum(1, c + 1, x->empty);
            }
            tmm_load_stream(5, a + TMM_ROWS * x->a_row, x->a_row);
            tmm_dot(2, 5, 6);
            soften_beside(f, exact_sums, pace, 1);
            tmm_load(7, b + 1, PANEL_ROW);
            tmm_dot(3, 5, 7);
            soften_beside(f, exact_sums, pace, 2);
            if (k + 1 == x->steps)
                tmm_store(0, c, PANEL_ROW);
            tmm_dot(1, 4, 7);
            soften_beside(f, exact_sums, pace, 3);
        }
        tmm_store(2, c + PANEL_BLOCK, PANEL_ROW);
        tmm_store(3, c + PANEL_BLOCK + 1, PANEL_ROW);
    }
}

/* Of numbers in parts, the products of parts after each other for every step, two blocks of rows at a time;
 * registers as above. What is beside it follows a step's first product. */
FA_INLINE void multiply_parts(const panel_product *x, pending_store *pending, softmax_stream *f,
                              bool exact_sums, softmax_pace pace)
{
    const char *rows = x->a;
    vec *c = x->c;
    for (int i = 0; i < x->blocks; i += 2, rows += 2 * TMM_ROWS * x->a_row, c += 2 * PANEL_BLOCK) {
        start_sum(0, c, x->empty);
        start_sum(2, c + PANEL_BLOCK, x->empty);
        start_sum(3, c + PANEL_BLOCK + 1, x->empty);
        int left = x->steps * x->parts->count;
        bool first = true;
        for (int k = 0; k < x->steps; k++) {
            int a_part = -1, b_part = -1;
            for (int q = 0; q < x->parts->count; q++) {
                if (x->parts->of[q].a != a_part) {
                    a_part = x->parts->of[q].a;
                    const char *a = rows + k * x->a_step + a_part * x->a_part;
                    tmm_load_stream(4, a, x->a_row);
                    tmm_load_stream(5, a + TMM_ROWS * x->a_row, x->a_row);
                }
                if (x->parts->of[q].b != b_part) {
                    b_part = x->parts->of[q].b;
                    const packed_vec *b = x->b + k * PANEL_BLOCK + b_part * x->b_part;
                    tmm_load(6, b, PANEL_ROW);
                    tmm_load(7, b + 1, PANEL_ROW);
                }
                tmm_dot(0, 4, 6);
                if (pace != PACE_NONE)
                    soften_by_credit(f, exact_sums, 4);
                tmm_dot(2, 5, 6);
                if (first) {
                    tmm_store(1, pending->at, PANEL_ROW);
                    pending->at = c + 1;
                    start_sum(1, c + 1, x->empty);
                    first = false;
                }
                tmm_dot(3, 5, 7);
                if (--left == 0)
                    tmm_store(0, c, PANEL_ROW);
                tmm_dot(1, 4, 7);
            }
        }
        tmm_store(2, c + PANEL_BLOCK, PANEL_ROW);
        tmm_store(3, c + PANEL_BLOCK + 1, PANEL_ROW);
    }
}

FA_INLINE void multiply_panel(const panel_product *x, pending_store *pending, softmax_stream *f,
                              bool exact_sums, softmax_pace pace)
{
    if (x->steps == 0) /* head_dim is 0 */
        memset(x->c, 0, (size_t)(x->blocks * PANEL_BLOCK) * sizeof(vec));
    else if (MAX_PARTS > 1)
        multiply_parts(x, pending, f, exact_sums, pace);
    else if (x->steps == 2)
        multiply_two_steps(x, pending, f, exact_sums, pace);
    else
        multiply_steps(x, pending, f, exact_sums, pace);
}

/* With nothing beside it, and nothing pending. */
FA_INLINE void multiply_panel_alone(const panel_product *x)
{
    softmax_stream none = {.rows = 0};
    vec nowhere[PANEL_BLOCK];
    pending_store pending = {nowhere, nowhere};
    multiply_panel(x, &pending, &none, false, PACE_NONE);
    finish_pending(&pending);
}

/* The unit's products with nothing else; of numbers in parts, as many make one. */
static double measure_peak_rounds(int64_t rounds)
{
    tmm_configure(&whole_registers);
    tmm_zero(0);
    tmm_zero(1);
    tmm_zero(2);
    tmm_zero(3);
    tmm_zero(6);
    tmm_zero(7);
    for (int64_t round = 0; round < rounds; round++) {
        tmm_dot(0, 6, 7);
        tmm_dot(1, 6, 7);
        tmm_dot(2, 6, 7);
        tmm_dot(3, 6, 7);
    }
    tmm_release();
    const int products = list_part_products(MAX_PARTS, MAX_PARTS, false).count;
    return (double)rounds * 4 * TMM_ROWS * LANES * TILE_K * 2 / products;
}

#endif

/* Lines that are needed soon, prefetched while the present ones are computed.
 *
 * Requires tile.h; provides key_range, row_stream and the prefetch plans of wide and decode tiles. */
#include "for_editors.h"

#ifndef FA_KERNEL_PREFETCH_H
#define FA_KERNEL_PREFETCH_H

#include <limits.h>

#include "tile.h"

/* Keys [first, last) of the panel, whole rows of it, of which [key_lo, key_hi) may be read. */
typedef struct {
    int64_t first, last;
    int64_t key_lo, key_hi;
} key_range;

FA_INLINE int num_keys(const key_range *range)
{
    return (int)(range->last - range->first);
}

/* Rows of the panel, of 2^key_shift keys each; known to be 1 in the copies for wide tiles. */
FA_INLINE int panel_rows(const tile *t, const key_range *range, bool decode)
{
    return decode ? num_keys(range) >> t->key_shift : num_keys(range);
}

/* The keys of the panel, from range->first on. */
FA_INLINE product_rows key_rows(const key_range *range, const operand_block *key)
{
    return (product_rows){key->data + (range->first - key->first) * key->row, key->row, key->col,
                          (int)(range->key_lo - range->first), (int)(range->key_hi - range->first)};
}

/* `count` rows, `row` bytes apart. */
typedef struct {
    const char *data;
    ptrdiff_t row;
    int count;
} row_stream;

/* Of the streams that a decode tile reads, so many are looked at for what is to be prefetched. */
#define STREAM_WINDOW 3

/* Rows at `data`, or none if they are not dense. */
FA_INLINE row_stream dense_stream(const char *data, const fa_array *array, int64_t columns, int count)
{
    return (row_stream){data, array->row, prefetch_span(array->col, columns) > 0 ? count : 0};
}

/* Rows that will be needed soon, prefetched while the present ones are worked on: the CPU cannot guess
 * where a row of 256 bytes is followed by another. The prefetches are spread over the work, keys and queries
 * over the rows of the first product, values and results over those of the second: memory serves few
 * lines at a time, and in one burst the work would wait for them. The micro-kernel prefetches those of
 * masks and biases, which are many, in both. */
typedef struct {
    const char *key, *value;
    int key_rows;
    const char *key_scale, *value_scale; /* of those keys; NULL: none */
    const row_stream *streams; /* what a decode tile reads: these keys, and STREAM_WINDOW - 1 runs behind */
    const char *query;         /* of the kv head's first query head */
    int64_t query_begin;
    int query_rows;
    int out_rows; /* of the tile itself */
} prefetch_plan;

/* `count` rows of `span` bytes; those without gaps are one run of lines. */
FA_INLINE void prefetch_rows(const char *data, ptrdiff_t row, ptrdiff_t span, int count)
{
    if (row == span) {
        prefetch_bytes(data, count * span);
        return;
    }
    for (int r = 0; r < count; r++)
        prefetch_bytes(data + r * row, span);
}

/* Rows [begin, begin + count) of those that are prefetched. */
FA_INLINE int rows_left(int begin, int count, int rows)
{
    return begin + count <= rows ? count : rows - begin;
}

FA_INLINE void prefetch_queries(const fa_problem *p, const prefetch_plan *plan, int begin, int count)
{
    const int64_t group_size = p->num_heads / p->num_kv_heads;
    const ptrdiff_t span = prefetch_span(p->query.col, p->head_dim);
    const int left = rows_left(begin, count, plan->query_rows);
    if (left <= 0)
        return;
    if (group_size == 1) {
        prefetch_rows(plan->query + (plan->query_begin + begin) * p->query.row, p->query.row, span, left);
        return;
    }
    for (int r = begin; r < begin + left; r++) {
        int64_t flat = plan->query_begin + r, row = flat / group_size;
        prefetch_bytes(plan->query + row * p->query.row + (flat - row * group_size) * p->query.head, span);
    }
}

/* How many of `count` rows fall to each of the steps over `columns` columns, `step` at a time. Once for all
 * of them: a division in each would cost as much as a tenth of its multiply-adds. */
FA_INLINE int share_of_step(int count, int64_t columns, int step)
{
    const int steps = ((int)columns + step - 1) / step;
    return steps > 0 ? (count + steps - 1) / steps : 0;
}

/* Lines that a product prefetches at once: L1 of Zen 4 has as many fill buffers. Products of
 * pairs prefetch all at once: their rows are half as long, and cut into stretches they took 2 % longer there.
 */
#define MAX_PREFETCH_BURST (TILE_K == 1 ? 24 : INT_MAX)

/* Rows that the products over a block prefetch, `share` each. Of the last product it may be rows that are not
 * there, which does no harm. */
typedef struct {
    product_prefetch first;
    int share, count;
    ptrdiff_t advance; /* bytes from one product's rows to the next one's */
} block_prefetch;

/* `count` rows at `data`, for products of `length` steps. Once for a block, and without a division where one
 * stretch will do: in each product they took short sequences 2 to 4 % of their time. */
FA_INLINE block_prefetch spread_prefetch(const char *data, const fa_array *array, int64_t columns, int count,
                                         int share, int length)
{
    ptrdiff_t span = prefetch_span(array->col, columns);
    if (count <= 0 || span <= 0)
        return (block_prefetch){0};
    block_prefetch all = {.share = share, .count = count, .advance = share * array->row};
    bool in_step = array->row % 64 == 0; /* all rows begin as many bytes behind the beginning of a line */
    if (array->row == span) {            /* they touch: as one row */
        span *= share;
        share = 1;
        in_step = true;
    }
    const ptrdiff_t lead = in_step ? (ptrdiff_t)((uintptr_t)data & 63) : 63; /* at most */
    int lines = (int)((lead + span + 63) / 64), every = length;
    if (share * lines > MAX_PREFETCH_BURST) {
        const int bursts =
            (int)min_i64((share * lines + MAX_PREFETCH_BURST - 1) / MAX_PREFETCH_BURST, length);
        every = (length + bursts - 1) / bursts;
        const int stretches = (length + every - 1) / every;
        lines = (lines + stretches - 1) / stretches;
    }
    all.first = (product_prefetch){in_step ? data - lead : data, array->row, share, lines, every};
    return all;
}

FA_INLINE product_prefetch nth_prefetch(const block_prefetch *all, int n, int length)
{
    if (n * all->share >= all->count)
        return (product_prefetch){.every = length};
    product_prefetch prefetch = all->first;
    prefetch.data += n * all->advance;
    return prefetch;
}

/* The results of step `step`, of as many that each takes so many. */
FA_INLINE void prefetch_out(const fa_problem *p, const tile *t, const prefetch_plan *plan, int step,
                            int results)
{
    for (int j = step * results; j < (step + 1) * results && j < plan->out_rows; j++)
        prefetch_for_write(t->out_row[j], prefetch_span(p->out.col, p->head_dim_v));
}

/* Rows [begin, begin + count) of the mask and the bias, of those up to `end`, of a block that begins with key
 * n. */
FA_INLINE void prefetch_score_mods(const fa_problem *p, const tile *t, int64_t n, int begin, int count,
                                   int end)
{
    const int64_t keys = min_i64(t->key_hi - n, KEY_BLOCK);
    if (keys <= 0)
        return;
    for (int j = begin; j < begin + count && j < end; j++) {
        if (p->bias.data)
            prefetch_bytes(t->bias[j] + n * p->bias.col, prefetch_span(p->bias.col, keys));
        if (p->mask.data)
            prefetch_bytes(t->mask[j] + n * p->mask.col, prefetch_span(p->mask.col, keys));
    }
}

#endif

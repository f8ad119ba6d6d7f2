/* Prefetching. The CPU cannot guess where a row of 256 bytes is followed by another, so rows that are needed
 * soon are prefetched while the present ones are worked on; spread over the work, because memory serves few
 * lines at a time, and behind one burst of them the work would wait.
 *
 * Rows are a row_stream. A prefetch_plan says which streams are prefetched over the steps of a product:
 * prefetch_step(plan, i) prefetches what is due before step i, and gives the rows whose lines that step
 * prefetches in its course. A step of a wide tile is a product of MICRO_ROWS rows, one of a decode tile a
 * row.
 *
 * Requires an operand; provides row_stream, prefetch_plan, prefetch_step, and prefetching by bytes and lines.
 */
#include "for_editors.h"

#ifndef FA_KERNEL_PREFETCH_H
#define FA_KERNEL_PREFETCH_H

#include <limits.h>

#include "../cpu.h"
#include "../dtypes.h"
#include "vec_types.h"

/* --- lines -------------------------------------------------------------------------------------- */

/* Prefetches the cache lines of `bytes` at `data`, in L2: L1 is full of the tile's own. Arrays rarely begin
 * with a line. Four lines a turn, because where sequences are short, prefetching is a twentieth of the work.
 */
FA_INLINE void prefetch_bytes(const char *data, ptrdiff_t bytes)
{
    const ptrdiff_t lead = (ptrdiff_t)((uintptr_t)data & 63);
    const ptrdiff_t lines = bytes > 0 ? (lead + bytes + 63) / 64 : 0;
#pragma GCC unroll 4
    for (ptrdiff_t i = 0; i < lines; i++)
        __builtin_prefetch(data - lead + 64 * i, 0, 2);
}

/* To be written. Of rows that touch, the last line comes with the row behind. */
FA_INLINE void prefetch_for_write(const char *data, ptrdiff_t bytes)
{
    for (ptrdiff_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(data + i, 1, 2);
}

/* Where lines are prefetched to, if they are. */
typedef enum { LINES_NOWHERE, LINES_TO_L2, LINES_TO_L1 } line_hint;

FA_INLINE void prefetch_line(const char *line, line_hint hint)
{
    if (hint == LINES_TO_L1)
        __builtin_prefetch(line, 0, 3);
    else
        __builtin_prefetch(line, 0, 2);
}

/* --- streams ------------------------------------------------------------------------------------ */

/* `count` rows of `span` bytes, `row` bytes apart. Of a head group, whose rows are numbered position by
 * position and head by head: the rows from `first` on, its heads `head` bytes apart. */
typedef struct {
    const char *data;
    ptrdiff_t row, span;
    int count;
    bool is_written; /* not read */
    int group_size, first;
    ptrdiff_t head;
} row_stream;

/* Bytes that `columns` elements span, if they lie densely enough to be prefetched as a range, else 0. */
FA_INLINE ptrdiff_t dense_span(const fa_array *array, int64_t columns)
{
    return array->col > 0 && array->col <= 16 ? array->col * columns : 0;
}

/* Field by field: a struct that is copied right after its fields were written waits for them. */
FA_INLINE void set_stream(row_stream *stream, const char *data, ptrdiff_t row, ptrdiff_t span, int count)
{
    stream->data = data;
    stream->row = row;
    stream->span = span;
    stream->count = count;
    stream->is_written = false;
    stream->group_size = 1;
}

/* Rows at `data`, or none if they are not dense. */
FA_INLINE void stream_rows(row_stream *stream, const char *data, const fa_array *array, int64_t columns,
                           int count)
{
    const ptrdiff_t span = dense_span(array, columns);
    set_stream(stream, data, array->row, span, span > 0 ? count : 0);
}

/* Rows of a head group from its row `first` on, whose row 0 is at `data`. */
FA_INLINE void stream_group_rows(row_stream *stream, const char *data, const fa_array *array, int64_t columns,
                                 int64_t first, int count, int64_t group_size)
{
    if (group_size == 1) {
        stream_rows(stream, data + first * array->row, array, columns, count);
        return;
    }
    const int64_t position = first / group_size;
    stream_rows(stream, data + position * array->row, array, columns, count);
    stream->group_size = (int)group_size;
    stream->first = (int)(first - position * group_size);
    stream->head = array->head;
}

/* Rows [begin, begin + count) of those that are prefetched. */
FA_INLINE int rows_left(int begin, int count, int rows)
{
    return begin + count <= rows ? count : rows - begin;
}

FA_INLINE const char *stream_row(const row_stream *s, int r)
{
    if (s->group_size == 1)
        return s->data + r * s->row;
    const int n = s->first + r, position = n / s->group_size;
    return s->data + position * s->row + (n - position * s->group_size) * s->head;
}

FA_INLINE void prefetch_row(const char *data, ptrdiff_t bytes, bool is_written)
{
    if (is_written)
        prefetch_for_write(data, bytes);
    else
        prefetch_bytes(data, bytes);
}

/* Rows [begin, begin + count), as far as there are any; those without gaps are one run of lines. */
FA_INLINE void prefetch_rows(const row_stream *s, int begin, int count, bool is_written)
{
    count = rows_left(begin, count, s->count);
    if (count <= 0)
        return;
    if (s->group_size == 1 && s->row == s->span) {
        prefetch_row(s->data + begin * s->row, count * s->span, is_written);
        return;
    }
    for (int r = begin; r < begin + count; r++)
        prefetch_row(stream_row(s, r), s->span, is_written);
}

/* --- the plan of a product ---------------------------------------------------------------------- */

/* Of the streams that a decode tile reads, so many are looked at for what is to be prefetched. */
#define STREAM_WINDOW 3

/* Streams that are shared out over the steps: queries, this block's bias, the next one's and its mask. */
#define MAX_SHARED_STREAMS 4

/* Lines that a product prefetches in its course: of `rows` rows, `row` bytes apart, `lines` lines each, every
 * `every` steps of the reduction. In one burst they would take all fill buffers of L1, and the product's own
 * operands would wait behind them: keys from memory then cost a tenth (Zen 4). */
typedef struct {
    const char *data;
    ptrdiff_t row;
    int rows, lines;
    int every; /* at least 1, but of products without steps */
} product_prefetch;

/* Streams of which steps prefetch some rows each. They are pointed at, not copied: see set_stream. */
typedef struct {
    int count;
    const row_stream *streams[MAX_SHARED_STREAMS];
    int shares[MAX_SHARED_STREAMS]; /* rows before each step */
} shared_streams;

typedef struct {
    const shared_streams *shared; /* apart, so that the plan itself stays in registers */
    /* What steps prefetch in their course: step i the rows from i * rows_per_step + distance on of streams
     * that are read one after the other, `lines.rows` at most, as `lines` says; behind the last row, `rest`.
     */
    const row_stream *streams;
    int num_streams, rows_per_step, distance;
    ptrdiff_t lead; /* from the beginning of a line to the first row */
    product_prefetch lines, rest;
} prefetch_plan;

FA_INLINE void share_stream(shared_streams *shared, const row_stream *stream, int share)
{
    if (stream->count > 0) {
        shared->streams[shared->count] = stream;
        shared->shares[shared->count++] = share;
    }
}

/* How many of `count` rows fall to each of the steps over `columns` columns, `step` at a time. Once for all
 * of them: a division in each would cost as much as a tenth of its multiply-adds. */
FA_INLINE int share_of_step(int count, int64_t columns, int step)
{
    const int steps = ((int)columns + step - 1) / step;
    return steps > 0 ? (count + steps - 1) / steps : 0;
}

/* Not inlined: most steps have none. Of prefetches alone GCC sees no effect, and would leave calls out. */
static __attribute__((noinline)) void prefetch_shares(const shared_streams *shared, int i)
{
    __asm__ volatile("");
    for (int k = 0; k < shared->count; k++) {
        const row_stream *stream = shared->streams[k];
        const int share = shared->shares[k];
        if (stream->is_written)
            prefetch_rows(stream, i * share, share, true);
        else
            prefetch_rows(stream, i * share, share, false);
    }
}

/* What is due before step i; and what the step prefetches in its course. */
FA_INLINE product_prefetch prefetch_step(const prefetch_plan *plan, int i)
{
    if (plan->shared)
        prefetch_shares(plan->shared, i);
    int n = i * plan->rows_per_step + plan->distance;
#pragma GCC unroll 3
    for (int k = 0; k < plan->num_streams; k++) {
        const row_stream *stream = &plan->streams[k];
        const int left = stream->count - n;
        if (left > 0)
            return (product_prefetch){stream->data - plan->lead + n * stream->row, stream->row,
                                      plan->lines.rows < left ? plan->lines.rows : left, plan->lines.lines,
                                      plan->lines.every};
        n = -left;
    }
    return plan->rest;
}

/* --- wide tiles ----------------------------------------------------------------------------------- */

/* Lines that a product prefetches at once. Products of pairs prefetch all at once: their rows are half as
 * long, and cut into stretches they took 2 % longer on Zen 4. */
FA_INLINE int max_prefetch_burst(void)
{
    return TILE_K == 1 ? fa_prefetching_of_cpu()->burst : INT_MAX;
}

FA_INLINE void prefetch_burst(const product_prefetch *prefetch, const char *data)
{
    for (int i = 0; i < prefetch->rows; i++, data += prefetch->row)
#pragma GCC unroll 4
        for (int line = 0; line < prefetch->lines; line++)
            __builtin_prefetch(data + 64 * line, 0, 2);
}

/* A plan whose products, of `length` steps of the reduction, prefetch `share` rows of the stream each. Once
 * for a block, and without a division where one stretch will do: in each product they took short sequences 2
 * to 4 % of their time. */
FA_INLINE void spread_stream(prefetch_plan *plan, const row_stream *stream, int share, int length)
{
    *plan = (prefetch_plan){.rest = {.every = INT_MAX}};
    if (stream->count <= 0)
        return;
    ptrdiff_t span = stream->span;
    int rows = share;
    bool in_step = stream->row % 64 == 0; /* all rows begin as many bytes behind the beginning of a line */
    if (stream->row == span) {            /* they touch: as one row */
        span *= share;
        rows = 1;
        in_step = true;
    }
    const ptrdiff_t lead = in_step ? (ptrdiff_t)((uintptr_t)stream->data & 63) : 63; /* at most */
    int lines = (int)((lead + span + 63) / 64), every = length;
    const int max_burst = max_prefetch_burst();
    if (rows * lines > max_burst) {
        const int most = (rows * lines + max_burst - 1) / max_burst;
        const int bursts = most < length ? most : length;
        every = (length + bursts - 1) / bursts;
        const int stretches = (length + every - 1) / every;
        lines = (lines + stretches - 1) / stretches;
    }
    plan->lines = (product_prefetch){.rows = rows, .lines = lines, .every = every};
    plan->lead = in_step ? lead : 0;
    plan->streams = stream;
    plan->num_streams = 1;
    plan->rows_per_step = share;
}

/* --- decode tiles --------------------------------------------------------------------------------- */

/* A tile reads in turn the keys of some blocks, their values, the keys of the next blocks, and so on, stream
 * by stream. While it reads a row, it prefetches line by line the one that comes this far behind. */
#define PREFETCH_DISTANCE_BYTES 16384

/* Of the rows that a tile of `rows` rows reads. A row that is read alone leaves its lines to the CPU, if that
 * likes it; not so where bytes are upcast. */
FA_INLINE line_hint hint_for_lines(fa_dtype dtype, int rows)
{
    const fa_prefetching *cpu = fa_prefetching_of_cpu();
    if (rows == 1 && !fa_traits(dtype).is_dear && !cpu->single_rows)
        return LINES_NOWHERE;
    return cpu->to_l1 ? LINES_TO_L1 : LINES_TO_L2;
}

/* Whether there is something to prefetch: known beforehand but for a single row. */
FA_INLINE bool prefetches_lines(fa_dtype dtype, int rows, line_hint hint)
{
    return rows > 1 || fa_traits(dtype).is_dear || hint != LINES_NOWHERE;
}

/* The plan of a product whose rows are streams[0], the first of STREAM_WINDOW that are read in turn. Of a
 * block that was packed, and thus read before, the distance is a whole block. With no rows to come, the row
 * at `again` is prefetched, so that no loop needs to ask. */
FA_INLINE void stream_ahead(prefetch_plan *plan, const row_stream *streams, bool packed, const char *again)
{
    const int most = streams[0].count + streams[1].count;
    const ptrdiff_t row = streams[0].row;
    plan->shared = NULL;
    plan->streams = streams;
    plan->num_streams = STREAM_WINDOW;
    plan->rows_per_step = 1;
    plan->distance = most;
    if (packed)
        plan->distance = streams[0].count;
    else if (row > 0 && PREFETCH_DISTANCE_BYTES / row < most)
        plan->distance = (int)(PREFETCH_DISTANCE_BYTES / row);
    plan->lead = 0;
    plan->lines = (product_prefetch){.rows = INT_MAX};
    plan->rest = (product_prefetch){.data = again, .rows = INT_MAX};
}

/* Rows to prefetch while others are read: line by line, `next_key` and `next_line` bytes apart. */
typedef struct {
    const char *data;
    ptrdiff_t row, next_key, next_line;
    line_hint hint;
} line_prefetch;

/* Of unrolled keys that touch, lines one after another, as memory serves them best. */
FA_INLINE line_prefetch spread_lines(const product_prefetch *rows, ptrdiff_t row_bytes, int unroll,
                                     line_hint hint)
{
    if (rows->row == row_bytes)
        return (line_prefetch){rows->data, rows->row, 64, 64 * unroll, hint};
    return (line_prefetch){rows->data, rows->row, rows->row, 64, hint};
}

#endif

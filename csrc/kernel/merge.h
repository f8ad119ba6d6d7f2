/* A row of a merge: the mean of rows of several results. See csrc/merge.c.
 *
 * Requires elements.h; provides mix_rows. */
#include "for_editors.h"

#ifndef FA_KERNEL_MERGE_H
#define FA_KERNEL_MERGE_H

#include "../kernel.h"
#include "elements.h"

FA_INLINE bool lie_side_by_side(const fa_weighted_row *rows, int64_t count, ptrdiff_t size)
{
    bool adjacent = true;
    for (int64_t i = 0; i < count; i++)
        adjacent &= rows[i].col == size;
    return adjacent;
}

/* Elements [first, first + columns) of the rows, weighted and summed, of which there may be none. */
FA_INLINE vec mix_elements(const fa_weighted_row *rows, int64_t count, int64_t first, int columns,
                           fa_dtype dtype, bool side_by_side)
{
    vec sum = {0};
    for (int64_t i = 0; i < count; i++) {
        const ptrdiff_t col = side_by_side ? element_size(dtype) : rows[i].col;
        sum += load_elements(rows[i].data + first * col, col, columns, dtype) * (real)rows[i].weight;
    }
    return sum;
}

FA_INLINE void mix_rows_of(const fa_merge_problem *m, const fa_weighted_row *rows, int64_t count, char *out,
                           fa_dtype dtype, bool side_by_side)
{
    int64_t n = 0;
    for (; n + LANES <= m->columns; n += LANES)
        store_elements(out + n * m->out.col, m->out.col, LANES, m->out.dtype,
                       mix_elements(rows, count, n, LANES, dtype, side_by_side));
    if (n < m->columns) {
        const int rest = (int)(m->columns - n);
        store_elements(out + n * m->out.col, m->out.col, rest, m->out.dtype,
                       mix_elements(rows, count, n, rest, dtype, side_by_side));
    }
}

FA_INLINE bool is_merged(fa_dtype dtype)
{
    return dtype == FA_REAL_DTYPE || (FA_REAL_BYTES == 4 && is_half(dtype));
}

/* Each element is read before its place in `out` is written, which may be that of one of the rows. */
static void mix_rows(const fa_merge_problem *m, const fa_weighted_row *rows, int64_t count, char *out)
{
    const fa_dtype dtype = m->outs[0].dtype;
    if (lie_side_by_side(rows, count, element_size(dtype)))
        WITH_DTYPE(dtype, is_merged, mix_rows_of(m, rows, count, out, DTYPE, true))
    else
        mix_rows_of(m, rows, count, out, dtype, false);
}

#endif

/* Results over disjoint sets of keys -> that over their union: a row is the mean of its sets' rows, weighted
 * by e^(lse_i - lse), where lse is the log of the sum of all e^lse_i.
 *
 * The weights are computed here, in double, a few a row; the rows by a kernel, which reads each element once.
 * Sets are summed in order, so that results are the same for any threads. */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "dispatch.h"
#include "run.h"

/* An item reads and writes so many bytes, about: much more than it takes to hand it out. A call of few is
 * computed by its own thread. */
#define ITEM_BYTES (128 << 10)

typedef struct {
    const fa_merge_problem *problem;
    const fa_kernel *kernel;
    int64_t rows, rows_per_item; /* of all batch items and heads */
} merge_pass;

/* Where the first row of a run is, of a set. */
typedef struct {
    const char *out, *lse;
} set_rows;

/* Rows [row, row + count) of one head. */
typedef struct {
    int64_t batch_index[FA_MAX_BATCH_DIMS];
    int64_t head, row, count;
} row_run;

/* Rows are numbered across heads and batch items; the run of row n, up to `end` at most. */
static row_run find_run(const fa_merge_problem *m, int64_t n, int64_t end)
{
    row_run run;
    run.row = n % m->seqlen;
    run.count = end - n < m->seqlen - run.row ? end - n : m->seqlen - run.row;
    n /= m->seqlen;
    run.head = n % m->num_heads;
    n /= m->num_heads;
    for (int axis = m->batch_ndim - 1; axis >= 0; axis--) {
        run.batch_index[axis] = n % m->batch_shape[axis];
        n /= m->batch_shape[axis];
    }
    return run;
}

static char *first_row(const fa_merge_problem *m, const fa_array *array, const row_run *run)
{
    char *data = array->data + run->head * array->head + run->row * array->row;
    for (int axis = 0; axis < m->batch_ndim; axis++)
        data += run->batch_index[axis] * array->batch[axis];
    return data;
}

static double load_lse(const char *data, fa_dtype dtype)
{
    float f;
    double d;
    if (dtype == FA_FLOAT64) {
        memcpy(&d, data, sizeof d);
        return d;
    }
    memcpy(&f, data, sizeof f);
    return f;
}

static void store_lse(char *data, fa_dtype dtype, double lse)
{
    const float f = (float)lse;
    if (dtype == FA_FLOAT64)
        memcpy(data, &lse, sizeof lse);
    else
        memcpy(data, &f, sizeof f);
}

/* The sets that have keys for row n of the run, with their lse as weight; *max_lse is the largest. */
static int64_t list_sets(const fa_merge_problem *m, const set_rows *sets, int64_t n, fa_weighted_row *rows,
                         double *max_lse)
{
    int64_t count = 0;
    *max_lse = -INFINITY;
    for (int64_t i = 0; i < m->num_sets; i++) {
        const double lse = load_lse(sets[i].lse + n * m->lses[i].row, m->lses[i].dtype);
        if (lse == -INFINITY)
            continue; /* adds nothing, whatever its result holds */
        rows[count++] = (fa_weighted_row){sets[i].out + n * m->outs[i].row, m->outs[i].col, lse};
        *max_lse = lse > *max_lse ? lse : *max_lse;
    }
    return count;
}

/* Makes weights of lses; the lse of all. */
static double weigh(fa_weighted_row *rows, int64_t count, double max_lse)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        rows[i].weight = exp(rows[i].weight - max_lse);
        sum += rows[i].weight;
    }
    const double inverse_sum = 1 / sum;
    for (int64_t i = 0; i < count; i++)
        rows[i].weight *= inverse_sum;
    return count > 0 ? max_lse + log(sum) : -INFINITY;
}

static void merge_run(const merge_pass *pass, const row_run *run, void *scratch, fa_stop *stop)
{
    const fa_merge_problem *m = pass->problem;
    set_rows *sets = scratch;
    fa_weighted_row *rows = (fa_weighted_row *)(sets + m->num_sets);
    for (int64_t i = 0; i < m->num_sets; i++)
        sets[i] = (set_rows){first_row(m, &m->outs[i], run), first_row(m, &m->lses[i], run)};
    char *out = first_row(m, &m->out, run), *lse = first_row(m, &m->lse, run);
    for (int64_t n = 0; n < run->count && !fa_should_stop(stop); n++) {
        double max_lse;
        const int64_t count = list_sets(m, sets, n, rows, &max_lse);
        store_lse(lse + n * m->lse.row, m->lse.dtype, weigh(rows, count, max_lse));
        pass->kernel->mix_rows(m, rows, count, out + n * m->out.row);
    }
}

static void compute_merge(const void *argument, fa_worker *worker, void *scratch)
{
    const merge_pass *pass = argument;
    while (fa_next_index(worker)) {
        const int64_t begin = worker->index * pass->rows_per_item;
        const int64_t end = fa_clamp(begin + pass->rows_per_item, 0, pass->rows);
        row_run run;
        for (int64_t n = begin; n < end; n += run.count) {
            run = find_run(pass->problem, n, end);
            merge_run(pass, &run, scratch, &worker->stop);
        }
    }
}

fa_status fa_merge(const fa_merge_problem *m)
{
    merge_pass pass = {m, fa_kernel_for_dtype(m->outs[0].dtype == FA_FLOAT64 ? FA_FLOAT64 : FA_FLOAT32),
                       m->num_heads * m->seqlen, 1};
    for (int axis = 0; axis < m->batch_ndim; axis++)
        pass.rows *= m->batch_shape[axis];
    if (pass.rows == 0)
        return FA_OK;
    const int64_t row_bytes = (m->num_sets + 1) * (m->columns + 1) * 4;
    pass.rows_per_item = fa_clamp(ITEM_BYTES / row_bytes, 1, pass.rows);
    const int64_t num_items = (pass.rows + pass.rows_per_item - 1) / pass.rows_per_item;
    const fa_job job = {
        .num_threads = fa_runnable_threads(m->num_threads < num_items ? m->num_threads : (int)num_items),
        .num_items = num_items,
        .scratch_bytes = (size_t)m->num_sets * (sizeof(set_rows) + sizeof(fa_weighted_row)),
        .interrupted = m->interrupted,
    };
    return fa_run(&job, compute_merge, &pass);
}

/* The gradient of a bias, in a pass of its own: each element is a sum over the scores that it was added to,
 * formed by one item, batch item by batch item and head by head, in that order. The pass computes scores and
 * dP once more; memory stays small however the bias is broadcast, and no thread waits for another.
 *
 * Axes along which the bias was broadcast, or has one element, have a stride of 0. */
#include "cpu.h"
#include "dispatch.h"
#include "plan.h"
#include "run.h"

/* Of an item, so that its sums stay in L2. */
#define MAX_BIAS_KEYS 1024

typedef struct {
    const fa_problem *problem;
    const fa_kernel *kernel;
    int64_t rows_per_item, keys_per_item;
    int64_t row_items, key_items, heads, batches; /* of the bias, along each axis */
} bias_pass;

static bool is_summed(const fa_problem *p, int axis)
{
    return p->gradients->grad_bias.batch[axis] == 0;
}

static int64_t count_bias_batches(const fa_problem *p)
{
    int64_t count = 1;
    for (int axis = 0; axis < p->batch_ndim; axis++)
        count *= is_summed(p, axis) ? 1 : p->batch_shape[axis];
    return count;
}

/* The first batch item of the bias's batch item n. */
static void index_bias_batch(const fa_problem *p, int64_t n, int64_t *batch_index)
{
    for (int axis = p->batch_ndim - 1; axis >= 0; axis--) {
        const int64_t size = is_summed(p, axis) ? 1 : p->batch_shape[axis];
        batch_index[axis] = n % size;
        n /= size;
    }
}

/* The next one that is summed with it; false behind the last. */
static bool next_summed_batch(const fa_problem *p, int64_t *batch_index)
{
    for (int axis = p->batch_ndim - 1; axis >= 0; axis--) {
        if (!is_summed(p, axis))
            continue;
        if (++batch_index[axis] < p->batch_shape[axis])
            return true;
        batch_index[axis] = 0;
    }
    return false;
}

static bias_pass plan_bias_pass(const fa_problem *p)
{
    const fa_array *to = &p->gradients->grad_bias;
    const fa_kernel *kernel = fa_select_backward_kernel(p);
    const int64_t tile_rows = (int64_t)kernel->lanes * kernel->max_vectors;
    bias_pass pass = {
        .problem = p,
        .kernel = kernel,
        .rows_per_item = to->row == 0 ? p->seqlen_q : tile_rows,
        .keys_per_item = to->col == 0 ? p->seqlen_k : MAX_BIAS_KEYS,
        .heads = to->head == 0 ? 1 : p->num_heads,
        .batches = count_bias_batches(p),
    };
    pass.row_items = (p->seqlen_q + pass.rows_per_item - 1) / pass.rows_per_item;
    pass.key_items = (p->seqlen_k + pass.keys_per_item - 1) / pass.keys_per_item;
    return pass;
}

/* Every tile of the rows of one head of one batch item. */
static void add_head(const bias_pass *pass, fa_bias_item *item, int64_t row_begin, int64_t row_end,
                     void *scratch, fa_stop *stop)
{
    const fa_problem *p = pass->problem;
    const int64_t tile_rows = (int64_t)pass->kernel->lanes * pass->kernel->max_vectors;
    item->work.kv_head = item->head / (p->num_heads / p->num_kv_heads);
    for (int64_t row = row_begin; row < row_end && !fa_should_stop(stop); row += tile_rows) {
        item->work.row_begin = row;
        item->work.row_end = row + tile_rows < row_end ? row + tile_rows : row_end;
        pass->kernel->add_bias_gradient(p, item, scratch, stop);
    }
}

static void compute_bias_item(const bias_pass *pass, int64_t index, void *scratch, fa_stop *stop)
{
    const fa_problem *p = pass->problem;
    const int64_t key_item = index % pass->key_items, row_item = index / pass->key_items % pass->row_items;
    const int64_t group = index / pass->key_items / pass->row_items;
    const int64_t row_begin = row_item * pass->rows_per_item;
    const int64_t row_end = fa_clamp(row_begin + pass->rows_per_item, 0, p->seqlen_q);
    fa_bias_item item = {.keys = {key_item * pass->keys_per_item, 0}, .row_begin = row_begin};
    item.keys.hi = fa_clamp(item.keys.lo + pass->keys_per_item, 0, p->seqlen_k);
    index_bias_batch(p, group / pass->heads, item.work.batch_index);
    const int64_t first_head = group % pass->heads;
    const int64_t last_head = p->gradients->grad_bias.head == 0 ? p->num_heads - 1 : first_head;
    pass->kernel->begin_bias_gradient(p, &item, scratch);
    do {
        item.work.sequence = fa_sequence_at(p, item.work.batch_index);
        for (item.head = first_head; item.head <= last_head; item.head++)
            add_head(pass, &item, row_begin, row_end, scratch, stop);
    } while (next_summed_batch(p, item.work.batch_index));
    item.head = first_head;
    item.row_end = row_end;
    pass->kernel->store_bias_gradient(p, &item, scratch);
}

static void compute_bias_gradient(const void *argument, fa_worker *worker, void *scratch)
{
    while (fa_next_index(worker))
        compute_bias_item(argument, worker->index, scratch, &worker->stop);
}

fa_status fa_bias_gradient(const fa_problem *p)
{
    if (p->num_heads == 0 || p->seqlen_q == 0 || p->seqlen_k == 0)
        return FA_OK;
    const bias_pass pass = plan_bias_pass(p);
    const int64_t num_items = pass.batches * pass.heads * pass.row_items * pass.key_items;
    for (int axis = 0; axis < p->batch_ndim; axis++)
        if (p->batch_shape[axis] == 0)
            return FA_OK;
    const int64_t threads = p->num_threads < num_items ? p->num_threads : num_items;
    const fa_job job = {
        .num_threads = fa_runnable_threads((int)threads),
        .num_items = num_items,
        .scratch_bytes = pass.kernel->bias_scratch_bytes(p, pass.keys_per_item),
        .flushes_subnormals = pass.kernel->flushes_subnormals,
        .interrupted = p->interrupted,
    };
    return fa_run(&job, compute_bias_gradient, &pass);
}

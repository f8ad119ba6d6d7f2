/* The forward and the backward pass: from a problem to its kernels' items. */
#include <assert.h>
#include <stdlib.h>

#include "dispatch.h"
#include "plan.h"
#include "run.h"

typedef struct {
    const fa_problem *problem;
    const fa_partition *partition;
    char *shared; /* partial results; see plan.h */
} attention_pass;

typedef struct {
    fa_work_item item;
    const fa_kernel *kernel;
} planned_item;

/* `before`: the item that the thread has computed before this one, or NULL. */
static void plan_item(const attention_pass *pass, int64_t index, const planned_item *before,
                      planned_item *planned)
{
    fa_work_item *item = &planned->item;
    planned->kernel = fa_item_at(pass->problem, pass->partition, index, pass->shared, item);
    item->same_geometry =
        before && before->kernel == planned->kernel && fa_same_geometry(&before->item, item);
}

static void compute_forward(const void *argument, fa_worker *worker, void *scratch)
{
    const attention_pass *pass = argument;
    planned_item items[2], *now = &items[0], *next = &items[1];
    const planned_item *before = NULL;
    bool is_planned = false; /* `now`, as the next item of the one before */
    while (fa_next_index(worker)) {
        if (!is_planned)
            plan_item(pass, worker->index, before, now);
        is_planned = worker->next >= 0;
        if (is_planned)
            plan_item(pass, worker->next, now, next);
        now->kernel->forward(pass->problem, &now->item, is_planned ? &next->item : NULL, scratch,
                             &worker->stop);
        before = now;
        now = next;
        next = &items[now == &items[0]];
    }
}

static void compute_backward(const void *argument, fa_worker *worker, void *scratch)
{
    const attention_pass *pass = argument;
    while (fa_next_index(worker)) {
        fa_work_item item;
        const fa_kernel *kernel =
            fa_item_at(pass->problem, pass->partition, worker->index, pass->shared, &item);
        kernel->backward(pass->problem, &item, scratch, &worker->stop);
    }
}

/* `bytes` of zeros, 64-byte aligned at *aligned; what is returned is to be freed. */
static void *allocate_zeros(size_t bytes, char **aligned)
{
    char *base = calloc(bytes + 63, 1);
    *aligned = base ? base + (63 & -(uintptr_t)base) : NULL;
    return base;
}

static fa_status attend(const fa_problem *problem,
                        void (*compute)(const void *argument, fa_worker *worker, void *scratch))
{
    fa_partition part;
    if (!fa_partition_problem(problem, &part))
        return FA_NO_MEMORY;
    fa_status status = FA_OK;
    char *shared = NULL;
    void *base = part.shared_bytes > 0 ? allocate_zeros(part.shared_bytes, &shared) : NULL;
    const attention_pass pass = {problem, &part, shared};
    const fa_job job = {
        .num_threads = part.num_threads,
        .num_items = part.num_items,
        .scratch_bytes = part.scratch_bytes,
        .flushes_subnormals = fa_kernel_for_dtype(problem->query.dtype)->flushes_subnormals,
        .interrupted = problem->interrupted,
    };
    if (part.shared_bytes > 0 && !base)
        status = FA_NO_MEMORY;
    else if (part.num_items > 0)
        status = fa_run(&job, compute, &pass);
    free(base);
    fa_free_partition(&part);
    return status;
}

fa_status fa_forward(const fa_problem *problem)
{
    assert(!problem->gradients);
    return attend(problem, compute_forward);
}

fa_status fa_backward(const fa_problem *problem)
{
    assert(problem->gradients);
    return attend(problem, compute_backward);
}

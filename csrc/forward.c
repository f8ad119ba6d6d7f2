/* From a problem to its kernel: select, plan, run the items on the pool. */
#include <stdlib.h>

#include "dispatch.h"
#include "float_mode.h"
#include "plan.h"
#include "schedule.h"
#include "threads.h"

typedef struct {
    const fa_problem *problem;
    const fa_partition *partition;
    char *shared; /* partial results; see plan.h */
    void *caller_scratch;
    bool flushes_subnormals;
    uint64_t caller_mode; /* the caller's float mode outside the kernels */
} forward_job;

/* Runs Python's signal handlers, in the float mode that they expect. */
static bool is_interrupted(void *argument)
{
    const forward_job *job = argument;
    if (!job->flushes_subnormals)
        return job->problem->interrupted();
    const uint64_t mode = fa_float_mode();
    fa_restore_float_mode(job->caller_mode);
    const bool interrupted = job->problem->interrupted();
    fa_restore_float_mode(mode);
    return interrupted;
}

typedef struct {
    fa_work_item item;
    const fa_kernel *kernel;
} planned_item;

/* `before`: the item that the thread has computed before this one, or NULL. */
static void plan_item(const forward_job *job, int64_t index, const planned_item *before,
                      planned_item *planned)
{
    fa_work_item *item = &planned->item;
    planned->kernel = fa_item_at(job->problem, job->partition, index, job->shared, item);
    item->same_geometry =
        before && before->kernel == planned->kernel && fa_same_geometry(&before->item, item);
}

static void compute_items(const forward_job *job, fa_worker *worker, void *scratch)
{
    planned_item items[2], *now = &items[0], *next = &items[1];
    const planned_item *before = NULL;
    bool is_planned = false; /* `now`, as the next item of the one before */
    while (fa_next_index(worker)) {
        if (!is_planned)
            plan_item(job, worker->index, before, now);
        is_planned = worker->next >= 0;
        if (is_planned)
            plan_item(job, worker->next, now, next);
        now->kernel->forward(job->problem, &now->item, is_planned ? &next->item : NULL, scratch,
                             &worker->stop);
        before = now;
        now = next;
        next = &items[now == &items[0]];
    }
}

static void compute_in_float_mode(const forward_job *job, fa_worker *worker, void *scratch)
{
    if (!job->flushes_subnormals) {
        compute_items(job, worker, scratch);
        return;
    }
    const uint64_t mode = fa_flush_subnormals();
    compute_items(job, worker, scratch);
    fa_restore_float_mode(mode);
}

static void work(void *argument, fa_worker *worker)
{
    const forward_job *job = argument;
    if (worker->thread_index == 0) {
        compute_in_float_mode(job, worker, job->caller_scratch);
        return;
    }
    void *scratch = fa_take_scratch(job->partition->scratch_bytes);
    if (!scratch)
        return; /* the other threads steal this one's items */
    compute_in_float_mode(job, worker, scratch);
    fa_give_back_scratch(scratch);
}

static fa_status forward_partition(const fa_problem *problem, const fa_partition *partition, char *shared)
{
    forward_job job = {
        .problem = problem,
        .partition = partition,
        .shared = shared,
        .caller_scratch = fa_take_scratch(partition->scratch_bytes),
        .flushes_subnormals =
            fa_select_kernel(problem, problem->seqlen_q, problem->seqlen_k)->flushes_subnormals,
        .caller_mode = fa_float_mode(),
    };
    if (!job.caller_scratch)
        return FA_NO_MEMORY;
    const bool finished = fa_run_schedule(partition->num_threads, partition->num_items, work,
                                          problem->interrupted ? is_interrupted : NULL, &job);
    fa_give_back_scratch(job.caller_scratch);
    return finished ? FA_OK : FA_INTERRUPTED;
}

/* `bytes` of zeros, 64-byte aligned at *aligned; what is returned is to be freed. */
static void *allocate_zeros(size_t bytes, char **aligned)
{
    char *base = calloc(bytes + 63, 1);
    *aligned = base ? base + (63 & -(uintptr_t)base) : NULL;
    return base;
}

fa_status fa_forward(const fa_problem *problem)
{
    fa_partition partition;
    if (!fa_partition_problem(problem, &partition))
        return FA_NO_MEMORY;
    fa_status status = FA_OK;
    char *shared = NULL;
    void *base = partition.shared_bytes > 0 ? allocate_zeros(partition.shared_bytes, &shared) : NULL;
    if (partition.shared_bytes > 0 && !base)
        status = FA_NO_MEMORY;
    else if (partition.num_items > 0)
        status = forward_partition(problem, &partition, shared);
    free(base);
    fa_free_partition(&partition);
    return status;
}

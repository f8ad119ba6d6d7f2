/* From a problem to its kernel: select, plan, run the items on the pool. */
#include <stdatomic.h>

#include "dispatch.h"
#include "plan.h"
#include "threads.h"

#define INTERRUPT_POLL_NANOSECONDS 50000000

/* Key blocks between two looks at the clock: some 10 µs of work each at the least that is worth a thread. */
#define BLOCKS_PER_CLOCK 16

typedef struct {
    fa_run run;
    const fa_kernel *kernel;
    const fa_partition *partition;
    int64_t num_items;
    _Atomic int64_t next_item;
    void *caller_scratch;
    int64_t next_poll;
    unsigned blocks; /* that the caller has begun */
} forward_job;

bool fa_should_stop(fa_run *run, bool is_caller)
{
    forward_job *job = (forward_job *)run; /* `run` is its first member */
    if (atomic_load_explicit(&run->stop, memory_order_relaxed))
        return true;
    if (is_caller && run->problem->interrupted && ++job->blocks % BLOCKS_PER_CLOCK == 0) {
        int64_t now = fa_nanoseconds();
        if (now >= job->next_poll) {
            job->next_poll = now + INTERRUPT_POLL_NANOSECONDS;
            if (run->problem->interrupted())
                atomic_store(&run->stop, true);
        }
    }
    return atomic_load_explicit(&run->stop, memory_order_relaxed);
}

static bool claim_item(forward_job *job, fa_item *item)
{
    int64_t index = atomic_fetch_add_explicit(&job->next_item, 1, memory_order_relaxed);
    if (index >= job->num_items)
        return false;
    *item = fa_item_at(job->run.problem, job->partition, index);
    return true;
}

/* While there is plenty, a thread claims an item before it works on the one it has, so that it can start
 * the next one's reads; the last ones go to whoever is free. */
static bool claim_ahead(forward_job *job, fa_item *item)
{
    int64_t claimed = atomic_load_explicit(&job->next_item, memory_order_relaxed);
    return claimed + 2 * job->partition->num_threads <= job->num_items && claim_item(job, item);
}

static void work_through_items(forward_job *job, void *scratch, bool is_caller)
{
    fa_item items[2];
    bool has_item = claim_item(job, &items[0]);
    for (int current = 0; has_item; current ^= 1) {
        fa_item *next = &items[current ^ 1];
        bool has_next = claim_ahead(job, next);
        job->kernel->forward(job->run.problem, &items[current], has_next ? next : NULL, scratch, &job->run,
                             is_caller);
        if (atomic_load_explicit(&job->run.stop, memory_order_relaxed))
            return;
        has_item = has_next || claim_item(job, next);
    }
}

/* The caller has run out of items, and waits. */
static void poll_while_waiting(void *argument)
{
    forward_job *job = argument;
    if (job->run.problem->interrupted && job->run.problem->interrupted())
        atomic_store(&job->run.stop, true);
}

static void forward_items(void *argument, int member)
{
    forward_job *job = argument;
    if (member == 0) {
        work_through_items(job, job->caller_scratch, true);
        return;
    }
    void *scratch = fa_take_scratch(job->partition->scratch_bytes);
    if (!scratch)
        return; /* the others do this member's share */
    work_through_items(job, scratch, false);
    fa_give_back_scratch(scratch);
}

fa_status fa_forward(const fa_problem *problem)
{
    const fa_kernel *kernel = fa_select_kernel(problem);
    fa_partition partition = fa_partition_problem(problem, kernel);
    forward_job job = {
        .run = {.problem = problem},
        .kernel = kernel,
        .partition = &partition,
        .num_items = partition.num_groups * partition.items_per_group,
    };
    if (job.num_items == 0)
        return FA_OK;
    job.caller_scratch = fa_take_scratch(partition.scratch_bytes);
    if (!job.caller_scratch)
        return FA_NO_MEMORY;
    if (problem->interrupted)
        job.next_poll = fa_nanoseconds() + INTERRUPT_POLL_NANOSECONDS;
    fa_parallel(partition.num_threads, forward_items, poll_while_waiting, &job);
    fa_give_back_scratch(job.caller_scratch);
    return atomic_load(&job.run.stop) ? FA_INTERRUPTED : FA_OK;
}

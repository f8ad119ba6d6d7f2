/* From a problem to its kernel: select, plan, run the items on the pool. */
#include <stdatomic.h>
#include <stdlib.h>

#include "dispatch.h"
#include "plan.h"
#include "threads.h"

#define INTERRUPT_POLL_NANOSECONDS 50000000

/* Key blocks between two looks at the clock: some 10 µs of work each at the least that is worth a thread. */
#define BLOCKS_PER_CLOCK 16

typedef struct {
    fa_run run;
    const fa_partition *partition;
    _Atomic int64_t next_item;
    char *shared; /* partial results; see plan.h */
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

typedef struct {
    fa_item item;
    const fa_kernel *kernel; /* NULL: no item */
} claim;

static void claim_item(forward_job *job, claim *c)
{
    int64_t index = atomic_fetch_add_explicit(&job->next_item, 1, memory_order_relaxed);
    c->kernel = NULL;
    if (index < job->partition->num_items)
        c->kernel = fa_item_at(job->run.problem, job->partition, index, job->shared, &c->item);
}

/* While there is plenty, a thread claims an item before it works on the one it has, so that it can start
 * the next one's reads; the last ones go to whoever is free. */
static void claim_ahead(forward_job *job, claim *c)
{
    int64_t claimed = atomic_load_explicit(&job->next_item, memory_order_relaxed);
    c->kernel = NULL;
    if (claimed + 2 * job->partition->num_threads <= job->partition->num_items)
        claim_item(job, c);
}

static void work_through_items(forward_job *job, void *scratch, bool is_caller)
{
    claim claims[2];
    claim_item(job, &claims[0]);
    for (int i = 0; claims[i].kernel; i ^= 1) {
        claim *now = &claims[i], *next = &claims[i ^ 1];
        claim_ahead(job, next);
        now->kernel->forward(job->run.problem, &now->item, next->kernel ? &next->item : NULL, scratch,
                             &job->run, is_caller);
        if (atomic_load_explicit(&job->run.stop, memory_order_relaxed))
            return;
        if (!next->kernel)
            claim_item(job, next);
    }
}

/* The caller has run out of items, and waits. */
static void poll_while_waiting(void *argument)
{
    forward_job *job = argument;
    if (atomic_load(&job->run.stop))
        return; /* an exception is on its way; another one would take its place */
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

static fa_status forward_partition(const fa_problem *problem, const fa_partition *partition, char *shared)
{
    forward_job job = {.run = {.problem = problem}, .partition = partition, .shared = shared};
    job.caller_scratch = fa_take_scratch(partition->scratch_bytes);
    if (!job.caller_scratch)
        return FA_NO_MEMORY;
    if (problem->interrupted)
        job.next_poll = fa_nanoseconds() + INTERRUPT_POLL_NANOSECONDS;
    fa_parallel(partition->num_threads, forward_items, poll_while_waiting, &job);
    fa_give_back_scratch(job.caller_scratch);
    return atomic_load(&job.run.stop) ? FA_INTERRUPTED : FA_OK;
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

/* From a problem to its kernel: select, plan, run the items on the pool. */
#include <stdatomic.h>
#include <stdlib.h>

#include "dispatch.h"
#include "plan.h"
#include "threads.h"

#define INTERRUPT_POLL_NANOSECONDS 50000000

/* Key blocks between two looks at the clock: some 10 µs of work each at the least that is worth a thread. */
#define BLOCKS_PER_CLOCK 16

/* Claims of many items at first and of single ones at the end: few, because each takes a cache line from the
 * other threads, which may be far away, and yet all threads end at the same time. */
#define CLAIMS_PER_THREAD 16

#define CACHE_LINE 64

/* What is written stays apart from what every thread reads again and again. */
typedef struct {
    _Alignas(CACHE_LINE) fa_run run;
    const fa_partition *partition;
    char *shared; /* partial results; see plan.h */
    _Alignas(CACHE_LINE) _Atomic int64_t next_item;
    _Alignas(CACHE_LINE) void *caller_scratch;
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

/* Items that a thread has claimed and not begun. */
typedef struct {
    int64_t begin, end;
} item_range;

/* Of sequences that differ, any item may be most of the work, and is claimed alone. */
static int64_t items_per_claim(const fa_partition *partition, int64_t items_left)
{
    int64_t items =
        partition->before ? 1 : items_left / ((int64_t)CLAIMS_PER_THREAD * partition->num_threads);
    return items > 1 ? items : 1;
}

static void claim_items(forward_job *job, item_range *mine)
{
    const int64_t num_items = job->partition->num_items;
    int64_t begun = atomic_load_explicit(&job->next_item, memory_order_relaxed);
    int64_t count = items_per_claim(job->partition, num_items - begun);
    mine->begin = atomic_fetch_add_explicit(&job->next_item, count, memory_order_relaxed);
    mine->end = mine->begin + count < num_items ? mine->begin + count : num_items;
}

static void take_item(forward_job *job, item_range *mine, claim *c)
{
    if (mine->begin >= mine->end)
        claim_items(job, mine);
    c->kernel = NULL;
    if (mine->begin < mine->end)
        c->kernel = fa_item_at(job->run.problem, job->partition, mine->begin++, job->shared, &c->item);
}

/* While there is plenty, a thread has an item before it works on the one before, so that it can start the
 * next one's reads; the last ones go to whoever is free. */
static void take_ahead(forward_job *job, item_range *mine, claim *c)
{
    int64_t claimed = atomic_load_explicit(&job->next_item, memory_order_relaxed);
    c->kernel = NULL;
    if (mine->begin < mine->end || claimed + 2 * job->partition->num_threads <= job->partition->num_items)
        take_item(job, mine, c);
}

static void work_through_items(forward_job *job, void *scratch, bool is_caller)
{
    item_range mine = {0};
    claim claims[2];
    take_item(job, &mine, &claims[0]);
    for (int i = 0; claims[i].kernel; i ^= 1) {
        claim *now = &claims[i], *next = &claims[i ^ 1];
        take_ahead(job, &mine, next);
        now->kernel->forward(job->run.problem, &now->item, next->kernel ? &next->item : NULL, scratch,
                             &job->run, is_caller);
        if (atomic_load_explicit(&job->run.stop, memory_order_relaxed))
            return;
        if (!next->kernel)
            take_item(job, &mine, next);
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

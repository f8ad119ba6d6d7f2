/* From a problem to its kernel: select, plan, run the items on the pool. */
#include <stdatomic.h>
#include <stdlib.h>

#include "dispatch.h"
#include "float_mode.h"
#include "plan.h"
#include "threads.h"

#define INTERRUPT_POLL_NANOSECONDS 50000000

/* Key blocks between two looks at the clock: some 10 µs of work each at the least that is worth a thread. */
#define BLOCKS_PER_CLOCK 16

#define CACHE_LINE 64
#define MAX_QUEUES 64

/* Items that nobody has begun: [next, end), in a cache line of their own. */
typedef struct {
    _Alignas(CACHE_LINE) _Atomic int64_t next;
    int64_t end;
} work_queue;

/* Each thread begins with a share of its own: in the next call on the same arrays it finds there what its
 * caches hold, and a claim takes no cache line from the other threads, which may be far away. Who has nothing
 * left helps with the shares of others. What is written stays apart from what every thread reads again and
 * again. */
typedef struct {
    _Alignas(CACHE_LINE) fa_run run;
    const fa_partition *partition;
    char *shared; /* partial results; see plan.h */
    int num_queues;
    bool flushes_subnormals;
    _Alignas(CACHE_LINE) void *caller_scratch;
    uint64_t caller_mode; /* the caller's float mode outside the kernels */
    int64_t next_poll;    /* 0: the clock has not been looked at */
    unsigned blocks;      /* that the caller has begun */
    work_queue queues[MAX_QUEUES];
} forward_job;

/* A signal handler of Python's may run, which finds the float mode that it expects. */
static bool is_interrupted(forward_job *job)
{
    if (!job->flushes_subnormals)
        return job->run.problem->interrupted();
    fa_restore_float_mode(job->caller_mode);
    const bool interrupted = job->run.problem->interrupted();
    fa_flush_subnormals();
    return interrupted;
}

bool fa_should_stop(fa_run *run, bool is_caller)
{
    forward_job *job = (forward_job *)run; /* `run` is its first member */
    if (atomic_load_explicit(&run->stop, memory_order_relaxed))
        return true;
    if (is_caller && run->problem->interrupted && ++job->blocks % BLOCKS_PER_CLOCK == 0) {
        int64_t now = fa_nanoseconds();
        if (job->next_poll == 0) /* so short calls never look at the clock */
            job->next_poll = now + INTERRUPT_POLL_NANOSECONDS;
        if (now >= job->next_poll) {
            job->next_poll = now + INTERRUPT_POLL_NANOSECONDS;
            if (is_interrupted(job))
                atomic_store(&run->stop, true);
        }
    }
    return atomic_load_explicit(&run->stop, memory_order_relaxed);
}

typedef struct {
    fa_work_item item;
    const fa_kernel *kernel; /* NULL: no item */
} claim;

/* The next item of a share; -1 if there is none. */
static int64_t pop(work_queue *queue)
{
    if (atomic_load_explicit(&queue->next, memory_order_relaxed) >= queue->end)
        return -1;
    int64_t index = atomic_fetch_add_explicit(&queue->next, 1, memory_order_relaxed);
    return index < queue->end ? index : -1;
}

/* From share `at` or, if that has none left, from those behind it. `before`: what the thread works on before
 * it, or NULL. */
static void pop_or_steal(forward_job *job, int *at, const claim *before, claim *c)
{
    c->kernel = NULL;
    for (int tried = 0; tried < job->num_queues; tried++) {
        int64_t index = pop(&job->queues[*at]);
        if (index >= 0) {
            c->kernel = fa_item_at(job->run.problem, job->partition, index, job->shared, &c->item);
            c->item.same_geometry =
                before && before->kernel == c->kernel && fa_same_geometry(&before->item, &c->item);
            return;
        }
        *at = (*at + 1) % job->num_queues;
    }
}

/* While its share has more, a thread has an item before it works on the one before, so that it can start the
 * next one's reads; a share's last one goes to whoever is free. */
static void pop_early(forward_job *job, int *at, const claim *before, claim *c)
{
    const work_queue *queue = &job->queues[*at];
    c->kernel = NULL;
    if (atomic_load_explicit(&queue->next, memory_order_relaxed) + 2 <= queue->end)
        pop_or_steal(job, at, before, c);
}

static void work_through_items(forward_job *job, void *scratch, int thread_index)
{
    const bool is_caller = thread_index == 0;
    int at = thread_index % job->num_queues;
    claim claims[2];
    pop_or_steal(job, &at, NULL, &claims[0]);
    for (int i = 0; claims[i].kernel; i ^= 1) {
        claim *now = &claims[i], *next = &claims[i ^ 1];
        pop_early(job, &at, now, next);
        now->kernel->forward(job->run.problem, &now->item, next->kernel ? &next->item : NULL, scratch,
                             &job->run, is_caller);
        if (atomic_load_explicit(&job->run.stop, memory_order_relaxed))
            return;
        if (!next->kernel)
            pop_or_steal(job, &at, now, next);
    }
}

static void work_in_float_mode(forward_job *job, void *scratch, int thread_index)
{
    if (!job->flushes_subnormals) {
        work_through_items(job, scratch, thread_index);
        return;
    }
    const uint64_t mode = fa_flush_subnormals();
    if (thread_index == 0)
        job->caller_mode = mode;
    work_through_items(job, scratch, thread_index);
    fa_restore_float_mode(mode);
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

static void forward_items(void *argument, int thread_index)
{
    forward_job *job = argument;
    if (thread_index == 0) {
        work_in_float_mode(job, job->caller_scratch, thread_index);
        return;
    }
    void *scratch = fa_take_scratch(job->partition->scratch_bytes);
    if (!scratch)
        return; /* the others do this member's share */
    work_in_float_mode(job, scratch, thread_index);
    fa_give_back_scratch(scratch);
}

static void fill_queues(forward_job *job)
{
    const fa_partition *partition = job->partition;
    job->num_queues = partition->num_threads < MAX_QUEUES ? partition->num_threads : MAX_QUEUES;
    for (int i = 0; i < job->num_queues; i++) {
        atomic_init(&job->queues[i].next, partition->num_items * i / job->num_queues);
        job->queues[i].end = partition->num_items * (i + 1) / job->num_queues;
    }
}

static fa_status forward_partition(const fa_problem *problem, const fa_partition *partition, char *shared)
{
    forward_job job; /* the shares beyond num_queues are never read */
    job.run = (fa_run){.problem = problem};
    job.partition = partition;
    job.shared = shared;
    job.flushes_subnormals = fa_select_kernel(problem)->flushes_subnormals;
    job.blocks = 0;
    job.next_poll = 0;
    fill_queues(&job);
    job.caller_scratch = fa_take_scratch(partition->scratch_bytes);
    if (!job.caller_scratch)
        return FA_NO_MEMORY;
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

#include "threads.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "fastattn.h"
#include "float_mode.h"
#include "platform.h"

/* How long a thread spins before it sleeps, the caller and the workers alike. To sleep and to be woken costs
 * microseconds. The calls of a decoding loop are closer together than this: a step of a KVCache has some 15
 * µs of Python between them, and a worker may have ended as much before the caller. A longer spin would take
 * the CPU from other processes. */
#define SPIN_NANOSECONDS 50000

/* Time between two calls of `idle` while the caller waits. */
#define IDLE_NANOSECONDS 50000000

/* A region is one call of fa_parallel. `ticket` publishes it: the region's number above, the number of its
 * threads in the low bits. Only workers below that number read task and argument, and the next region is not
 * published before all of them have finished, so a worker that is late never sees a region half-written. */
#define COUNT_BITS 16
#define COUNT_MASK (((uint64_t)1 << COUNT_BITS) - 1)

static struct {
    atomic_bool busy;
    _Atomic uint64_t ticket;
    atomic_int unfinished;     /* workers still in the task */
    atomic_bool caller_sleeps; /* until none is left */
    int num_workers;           /* touched only by the thread that holds `busy` */
    void (*task)(void *argument, int thread_index);
    void *argument;
    uint64_t float_mode; /* the caller's */
} pool;

/* By thread index. Each worker sleeps on a condition variable of its own: a region wakes those that it has
 * work for, however many there are. */
static struct {
    uint64_t first_ticket; /* that was current when it was created */
    atomic_bool sleeps;    /* until a ticket is published */
} workers[FA_MAX_THREADS];

static _Thread_local bool inside_task;

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Spins while `waiting(context)`; true if it ended within the spin. */
static bool spin_while(bool (*waiting)(uint64_t context), uint64_t context)
{
    int64_t end = fa_nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 32; i++) {
            if (!waiting(context))
                return true;
            relax();
        }
    } while (fa_nanoseconds() < end);
    return false;
}

static bool no_new_ticket(uint64_t seen)
{
    return atomic_load(&pool.ticket) == seen;
}

static bool some_unfinished(uint64_t unused)
{
    (void)unused;
    return atomic_load(&pool.unfinished) > 0;
}

static uint64_t wait_for_ticket(uint64_t seen, int thread_index)
{
    if (!spin_while(no_new_ticket, seen)) {
        fa_lock_pool();
        atomic_store(&workers[thread_index].sleeps, true);
        while (no_new_ticket(seen))
            fa_wait(thread_index);
        atomic_store(&workers[thread_index].sleeps, false);
        fa_unlock_pool();
    }
    return atomic_load(&pool.ticket);
}

static void work(int thread_index)
{
    inside_task = true;
    for (uint64_t ticket = workers[thread_index].first_ticket;;) {
        ticket = wait_for_ticket(ticket, thread_index);
        if (thread_index >= (int)(ticket & COUNT_MASK))
            continue;
        fa_restore_float_mode(pool.float_mode);
        pool.task(pool.argument, thread_index);
        if (atomic_fetch_sub(&pool.unfinished, 1) == 1 && atomic_load(&pool.caller_sleeps)) {
            fa_lock_pool();
            fa_signal(0);
            fa_unlock_pool();
        }
    }
}

/* After a fork the child has the pool's memory but none of its threads. */
static void reset_in_child(void)
{
    atomic_store(&pool.busy, false);
    atomic_store(&pool.unfinished, 0);
    atomic_store(&pool.caller_sleeps, false);
    pool.num_workers = 0;
}

/* When the library is loaded: another thread may fork while the first region runs. */
__attribute__((constructor)) static void watch_forks(void)
{
    fa_on_fork(reset_in_child);
}

static bool create_worker(int thread_index)
{
    workers[thread_index].first_ticket = atomic_load(&pool.ticket);
    atomic_store(&workers[thread_index].sleeps, false);
    return fa_start_thread(thread_index, work);
}

static int grow_pool(int wanted)
{
    if (wanted > FA_MAX_THREADS - 1)
        wanted = FA_MAX_THREADS - 1;
    while (pool.num_workers < wanted && create_worker(pool.num_workers + 1))
        pool.num_workers++;
    return pool.num_workers < wanted ? pool.num_workers : wanted;
}

static void publish(int num_threads)
{
    uint64_t region = (atomic_load(&pool.ticket) >> COUNT_BITS) + 1;
    atomic_store(&pool.unfinished, num_threads - 1);
    atomic_store(&pool.ticket, region << COUNT_BITS | (uint64_t)num_threads);
    for (int thread_index = 1; thread_index < num_threads; thread_index++) {
        if (!atomic_load(&workers[thread_index].sleeps))
            continue;
        fa_lock_pool();
        fa_signal(thread_index);
        fa_unlock_pool();
    }
}

static void wait_for_workers(void (*idle)(void *argument), void *argument)
{
    if (spin_while(some_unfinished, 0))
        return;
    fa_lock_pool();
    atomic_store(&pool.caller_sleeps, true);
    while (some_unfinished(0)) {
        if (!fa_wait_for(0, IDLE_NANOSECONDS) && idle) {
            fa_unlock_pool(); /* `idle` may call this library */
            idle(argument);
            fa_lock_pool();
        }
    }
    atomic_store(&pool.caller_sleeps, false);
    fa_unlock_pool();
}

void fa_parallel(int num_threads, void (*task)(void *argument, int thread_index),
                 void (*idle)(void *argument), void *argument)
{
    if (num_threads <= 1 || inside_task || atomic_exchange(&pool.busy, true)) {
        task(argument, 0);
        return;
    }
    int workers = grow_pool(num_threads - 1);
    pool.task = task;
    pool.argument = argument;
    pool.float_mode = fa_float_mode();
    if (workers > 0)
        publish(workers + 1);
    inside_task = true;
    task(argument, 0);
    if (workers > 0)
        wait_for_workers(idle, argument);
    inside_task = false;
    atomic_store(&pool.busy, false);
}

/* --- scratch ------------------------------------------------------------------------------------ */

/* A backward pass over long keys takes more, which is not to be kept from others until the thread ends. */
#define MAX_KEPT_SCRATCH_BYTES ((size_t)16 << 20)

static _Thread_local struct {
    void *data;
    size_t bytes;
    bool taken;
} scratch;

void *fa_take_scratch(size_t bytes)
{
    if (!scratch.taken && bytes <= scratch.bytes) {
        scratch.taken = true;
        return scratch.data;
    }
    void *data = fa_allocate(bytes);
    if (data && !scratch.taken) {
        fa_free(scratch.data);
        fa_free_with_thread(data);
        scratch.data = data;
        scratch.bytes = bytes;
        scratch.taken = true;
    }
    return data;
}

void fa_give_back_scratch(void *data)
{
    if (data == scratch.data) {
        scratch.taken = false;
        if (scratch.bytes <= MAX_KEPT_SCRATCH_BYTES)
            return;
        fa_free_with_thread(NULL);
        scratch.data = NULL;
        scratch.bytes = 0;
    }
    fa_free(data);
}

/* --- how many ----------------------------------------------------------------------------------- */

static atomic_int default_num_threads; /* 0: not decided yet */

static int positive_from_environment(const char *name)
{
    const char *text = getenv(name);
    long value = text ? strtol(text, NULL, 10) : 0;
    if (value > FA_MAX_THREADS)
        value = FA_MAX_THREADS;
    return value > 0 ? (int)value : 0;
}

int fa_get_num_threads(void)
{
    int count = atomic_load(&default_num_threads);
    if (count > 0)
        return count;
    count = positive_from_environment("FASTATTN_NUM_THREADS");
    if (count == 0)
        count = positive_from_environment("OMP_NUM_THREADS");
    if (count == 0)
        count = fa_available_cpus();
    fa_set_num_threads(count);
    return count;
}

void fa_set_num_threads(int num_threads)
{
    atomic_store(&default_num_threads, num_threads > FA_MAX_THREADS ? FA_MAX_THREADS : num_threads);
}

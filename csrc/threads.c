#define _GNU_SOURCE
#include "threads.h"

#include <errno.h>
#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "fastattn.h"

#define MAX_WORKERS 1023

/* How long a thread spins before it sleeps, on both sides. A sleep and a wake cost microseconds; calls in a
 * row come closer together than this: in a step of a KVCache some 15 µs of Python lie between them, and a
 * worker may have ended as much before the caller. (At 30 µs the median of such steps was 4 % longer.) A
 * longer spin would take the CPU from others. */
#define SPIN_NANOSECONDS 50000

/* How often a caller that waits looks around. */
#define IDLE_NANOSECONDS 50000000

/* A region is announced by `ticket`: its number above, its members in the low bits. Only members read
 * task and argument, and the next region is not announced before all of them have finished, so a slow
 * bystander cannot see a region half-written. */
#define MEMBER_BITS 16
#define MEMBER_MASK (((uint64_t)1 << MEMBER_BITS) - 1)

static struct {
    pthread_mutex_t lock;
    pthread_cond_t finished;
    atomic_bool busy;
    _Atomic uint64_t ticket;
    atomic_int unfinished;     /* workers still in the task */
    atomic_bool caller_sleeps; /* the caller waits for `finished` */
    int num_workers;           /* touched only by the thread that holds `busy` */
    void (*task)(void *argument, int thread_index);
    void *argument;
    fenv_t environment;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .finished = PTHREAD_COND_INITIALIZER};

/* By member. Each sleeps by itself: a region wakes those that it has work for, however many there are. */
static struct {
    pthread_cond_t published;
    atomic_bool sleeps;
} workers[MAX_WORKERS + 1];

static _Thread_local bool inside_task;

int64_t fa_nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

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
        pthread_mutex_lock(&pool.lock);
        atomic_store(&workers[thread_index].sleeps, true);
        while (no_new_ticket(seen))
            pthread_cond_wait(&workers[thread_index].published, &pool.lock);
        atomic_store(&workers[thread_index].sleeps, false);
        pthread_mutex_unlock(&pool.lock);
    }
    return atomic_load(&pool.ticket);
}

/* What a new worker is told: its number, and the ticket that was current when it was created. */
typedef struct {
    int thread_index;
    uint64_t ticket;
} worker_start;

static void *work(void *argument)
{
    worker_start mine = *(worker_start *)argument;
    free(argument);
    inside_task = true;
    for (uint64_t ticket = mine.ticket;;) {
        ticket = wait_for_ticket(ticket, mine.thread_index);
        if (mine.thread_index >= (int)(ticket & MEMBER_MASK))
            continue;
        fesetenv(&pool.environment);
        pool.task(pool.argument, mine.thread_index);
        if (atomic_fetch_sub(&pool.unfinished, 1) == 1 && atomic_load(&pool.caller_sleeps)) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.finished);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

/* After a fork the child has the pool's memory but none of its threads. */
static void reset_in_child(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.finished, NULL);
    atomic_store(&pool.busy, false);
    atomic_store(&pool.unfinished, 0);
    atomic_store(&pool.caller_sleeps, false);
    pool.num_workers = 0;
}

/* When the library is loaded: by the first region it would be too late for a fork in the middle of that. */
__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, reset_in_child);
}

/* Workers block signals: those are the main thread's, where Python handles them. Faults are their own. */
static bool create_worker(int thread_index)
{
    worker_start *argument = malloc(sizeof *argument);
    if (!argument)
        return false;
    *argument = (worker_start){thread_index, atomic_load(&pool.ticket)};
    pthread_cond_init(&workers[thread_index].published, NULL);
    atomic_store(&workers[thread_index].sleeps, false);
    sigset_t all, previous;
    sigfillset(&all);
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    for (int i = 0; i < 4; i++)
        sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    pthread_t thread;
    bool created = pthread_create(&thread, NULL, work, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    if (created)
        pthread_detach(thread);
    else
        free(argument);
    return created;
}

static int grow_pool(int wanted)
{
    if (wanted > MAX_WORKERS)
        wanted = MAX_WORKERS;
    while (pool.num_workers < wanted && create_worker(pool.num_workers + 1))
        pool.num_workers++;
    return pool.num_workers < wanted ? pool.num_workers : wanted;
}

static void publish(int members)
{
    uint64_t region = (atomic_load(&pool.ticket) >> MEMBER_BITS) + 1;
    atomic_store(&pool.unfinished, members - 1);
    atomic_store(&pool.ticket, region << MEMBER_BITS | (uint64_t)members);
    for (int thread_index = 1; thread_index < members; thread_index++) {
        if (!atomic_load(&workers[thread_index].sleeps))
            continue;
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&workers[thread_index].published);
        pthread_mutex_unlock(&pool.lock);
    }
}

static void wait_for_workers(void (*idle)(void *argument), void *argument)
{
    if (spin_while(some_unfinished, 0))
        return;
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.caller_sleeps, true);
    while (some_unfinished(0)) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += IDLE_NANOSECONDS;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        if (pthread_cond_timedwait(&pool.finished, &pool.lock, &until) == ETIMEDOUT && idle) {
            pthread_mutex_unlock(&pool.lock); /* it may call us */
            idle(argument);
            pthread_mutex_lock(&pool.lock);
        }
    }
    atomic_store(&pool.caller_sleeps, false);
    pthread_mutex_unlock(&pool.lock);
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
    fegetenv(&pool.environment);
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

static pthread_key_t scratch_key; /* its only use is to free the buffer with its thread */
static _Thread_local struct {
    void *data;
    size_t bytes;
    bool taken;
} scratch;

static bool has_scratch_key;

__attribute__((constructor)) static void create_scratch_key(void)
{
    has_scratch_key = pthread_key_create(&scratch_key, free) == 0;
}

void *fa_take_scratch(size_t bytes)
{
    if (!scratch.taken && bytes <= scratch.bytes) {
        scratch.taken = true;
        return scratch.data;
    }
    void *data;
    if (posix_memalign(&data, 64, bytes) != 0)
        return NULL;
    if (!scratch.taken) {
        free(scratch.data);
        if (has_scratch_key)
            pthread_setspecific(scratch_key, data);
        scratch.data = data;
        scratch.bytes = bytes;
        scratch.taken = true;
    }
    return data;
}

void fa_give_back_scratch(void *data)
{
    if (data == scratch.data)
        scratch.taken = false;
    else
        free(data);
}

/* --- how many ----------------------------------------------------------------------------------- */

static atomic_int default_num_threads; /* 0: not decided yet */

static int positive_from_environment(const char *name)
{
    const char *text = getenv(name);
    long value = text ? strtol(text, NULL, 10) : 0;
    if (value > MAX_WORKERS + 1)
        value = MAX_WORKERS + 1;
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
    atomic_store(&default_num_threads, num_threads > MAX_WORKERS + 1 ? MAX_WORKERS + 1 : num_threads);
}

/* platform.h for POSIX systems; affinity is that of Linux where there is one. */
#define _GNU_SOURCE
#include "platform.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <sched.h>
#endif

#define NANOSECONDS_PER_SECOND INT64_C(1000000000)

int64_t fa_nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * NANOSECONDS_PER_SECOND + now.tv_nsec;
}

static struct timespec to_timespec(int64_t nanoseconds)
{
    return (struct timespec){.tv_sec = (time_t)(nanoseconds / NANOSECONDS_PER_SECOND),
                             .tv_nsec = (long)(nanoseconds % NANOSECONDS_PER_SECOND)};
}

int fa_affinity_cpus(void)
{
#ifdef __linux__
    cpu_set_t sets[64]; /* the kernel refuses fewer bits than it has CPUs */
    for (size_t bytes = sizeof sets[0]; bytes <= sizeof sets; bytes *= 8)
        if (sched_getaffinity(0, bytes, sets) == 0)
            return CPU_COUNT_S(bytes, sets);
#endif
    const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return cpus > 0 ? (int)cpus : 1;
}

/* --- the lock and the condition variables --------------------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t conditions[FA_MAX_THREADS];

/* fa_wait_for measures by a clock that nobody sets; macOS's condition variables cannot be told, but wait for
 * a time from now. */
#ifdef __APPLE__

static void init_condition(int thread_index)
{
    pthread_cond_init(&conditions[thread_index], NULL);
}

static int wait_until_timeout(pthread_cond_t *condition, int64_t nanoseconds)
{
    const struct timespec time = to_timespec(nanoseconds);
    return pthread_cond_timedwait_relative_np(condition, &lock, &time);
}

#else

static void init_condition(int thread_index)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&conditions[thread_index], &attributes);
    pthread_condattr_destroy(&attributes);
}

static int wait_until_timeout(pthread_cond_t *condition, int64_t nanoseconds)
{
    const struct timespec end = to_timespec(fa_nanoseconds() + nanoseconds);
    return pthread_cond_timedwait(condition, &lock, &end);
}

#endif

/* When the library is loaded; fa_start_thread: the others. */
__attribute__((constructor)) static void init_caller_condition(void)
{
    init_condition(0);
}

void fa_lock_pool(void)
{
    pthread_mutex_lock(&lock);
}

void fa_unlock_pool(void)
{
    pthread_mutex_unlock(&lock);
}

void fa_wait(int thread_index)
{
    pthread_cond_wait(&conditions[thread_index], &lock);
}

bool fa_wait_for(int thread_index, int64_t nanoseconds)
{
    return wait_until_timeout(&conditions[thread_index], nanoseconds) != ETIMEDOUT;
}

void fa_signal(int thread_index)
{
    pthread_cond_signal(&conditions[thread_index]);
}

static void (*reset_after_fork)(void);

static void reset_in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    init_condition(0);
    reset_after_fork();
}

void fa_on_fork(void (*reset)(void))
{
    reset_after_fork = reset;
    pthread_atfork(NULL, NULL, reset_in_child);
}

/* --- threads -------------------------------------------------------------------------------------- */

typedef struct {
    void (*run)(int thread_index);
    int thread_index;
} thread_start;

static void *start(void *argument)
{
    const thread_start mine = *(thread_start *)argument;
    free(argument);
    mine.run(mine.thread_index);
    return NULL;
}

static void block_signals(sigset_t *previous)
{
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    sigset_t blocked;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, previous);
}

bool fa_start_thread(int thread_index, void (*run)(int thread_index))
{
    thread_start *copy = malloc(sizeof *copy);
    if (!copy)
        return false;
    *copy = (thread_start){run, thread_index};
    init_condition(thread_index);
    sigset_t previous;
    block_signals(&previous); /* a thread begins with the mask of its creator */
    pthread_t thread;
    const bool created = pthread_create(&thread, NULL, start, copy) == 0;
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    if (created)
        pthread_detach(thread);
    else
        free(copy);
    return created;
}

/* --- memory --------------------------------------------------------------------------------------- */

void *fa_allocate(size_t bytes)
{
    void *data;
    return posix_memalign(&data, 64, bytes) == 0 ? data : NULL;
}

void fa_free(void *data)
{
    free(data);
}

static pthread_key_t thread_memory;
static bool has_thread_memory;

__attribute__((constructor)) static void create_key(void)
{
    has_thread_memory = pthread_key_create(&thread_memory, free) == 0;
}

void fa_free_with_thread(void *data)
{
    if (has_thread_memory)
        pthread_setspecific(thread_memory, data);
}

/* Drives the schedule alone, on the real pool: each index is worked on exactly once, whoever steals it; a
 * request to stop reaches every thread; and only the caller is interrupted. ThreadSanitizer sees its every
 * access. */
#include "check.h"
#include "schedule.h"
#include "system.h"

enum { MAX_INDICES = 500, MAX_THREADS = 8 };

typedef struct {
    int64_t num_indices;
    atomic_int threads;
    atomic_int num_done;
    int done[MAX_INDICES]; /* plain ints: two writers of one would be a race */
    atomic_int num_polls;
    pthread_t caller;
} job;

static void take(job *j, fa_worker *worker)
{
    REQUIRE(worker->index >= 0 && worker->index < j->num_indices);
    j->done[worker->index]++;
    atomic_fetch_add(&j->num_done, 1);
}

static void work(void *argument, fa_worker *worker)
{
    job *j = argument;
    REQUIRE(worker->thread_index >= 0 && worker->thread_index < MAX_THREADS);
    atomic_fetch_add(&j->threads, 1);
    int64_t expected = -1;
    while (fa_next_index(worker)) {
        REQUIRE(expected < 0 || worker->index == expected);
        expected = worker->next;
        take(j, worker);
    }
    REQUIRE(expected < 0, "an index was popped early and then forgotten");
}

static void check_all_done(const job *j)
{
    for (int64_t i = 0; i < j->num_indices; i++)
        REQUIRE(j->done[i] == 1, "index %d of %d", (int)i, (int)j->num_indices);
}

static void check_each_index_once(int num_threads, int64_t num_indices)
{
    job j = {.num_indices = num_indices};
    REQUIRE(fa_run_schedule(num_threads, num_indices, work, NULL, &j));
    check_all_done(&j);
    REQUIRE(atomic_load(&j.threads) >= 1 && atomic_load(&j.threads) <= (num_threads > 1 ? num_threads : 1));
}

/* The caller holds its first index until the others have done what is left of its queue. */
static void wait_for_thieves(void *argument, fa_worker *worker)
{
    job *j = argument;
    while (fa_next_index(worker)) {
        take(j, worker);
        const int kept = worker->next >= 0; /* popped already: nobody can steal it */
        while (worker->thread_index == 0 && atomic_load(&j->num_done) < j->num_indices - kept)
            usleep(100);
    }
}

static void check_stealing(int num_threads)
{
    job j = {.num_indices = MAX_INDICES};
    REQUIRE(fa_run_schedule(num_threads, j.num_indices, wait_for_thieves, NULL, &j));
    check_all_done(&j);
}

static bool interrupt_once(void *argument)
{
    job *j = argument;
    REQUIRE(pthread_equal(pthread_self(), j->caller));
    atomic_fetch_add(&j->num_polls, 1);
    return true;
}

static void work_until_stopped(void *argument, fa_worker *worker)
{
    job *j = argument;
    while (fa_next_index(worker)) {
        take(j, worker);
        while (!fa_should_stop(&worker->stop))
            ;
    }
}

static void check_stop(int num_threads)
{
    job j = {.num_indices = MAX_INDICES, .caller = pthread_self()};
    REQUIRE(!fa_run_schedule(num_threads, j.num_indices, work_until_stopped, interrupt_once, &j));
    REQUIRE(atomic_load(&j.num_polls) == 1);
    REQUIRE(atomic_load(&j.num_done) <= num_threads, "a thread has gone on");
}

/* The caller returns at once, and is asked while it waits for the others. */
static void leave_it_to_workers(void *argument, fa_worker *worker)
{
    if (worker->thread_index > 0)
        work_until_stopped(argument, worker);
}

static void check_stop_while_the_caller_waits(void)
{
    job j = {.num_indices = MAX_INDICES, .caller = pthread_self()};
    REQUIRE(!fa_run_schedule(3, j.num_indices, leave_it_to_workers, interrupt_once, &j));
    REQUIRE(atomic_load(&j.num_polls) == 1);
}

static bool never(void *argument)
{
    atomic_fetch_add(&((job *)argument)->num_polls, 1);
    return false;
}

static void check_uninterrupted(void)
{
    job j = {.num_indices = MAX_INDICES};
    REQUIRE(fa_run_schedule(4, j.num_indices, work, never, &j));
    check_all_done(&j);
}

int main(void)
{
    limit_time();
    for (int i = 0; i < 400; i++)
        check_each_index_once(1 + i % MAX_THREADS, i % (MAX_INDICES + 1));
    for (int num_threads = 2; num_threads <= MAX_THREADS; num_threads++)
        check_stealing(num_threads);
    check_stop(1);
    check_stop(4);
    check_stop_while_the_caller_waits();
    check_uninterrupted();
    return 0;
}

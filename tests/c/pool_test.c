/* Drives the pool of threads alone, so that ThreadSanitizer sees its every access.
 *
 * Checks that each region's items are done exactly once, whoever calls and from wherever; that nested
 * and simultaneous calls run inline; that all compute in the caller's float mode; that a forked child has a
 * working pool; and that scratch is each thread's own. */
#include <fenv.h>
#include <stdatomic.h>
#include <string.h>
#ifndef _WIN32
#include <sys/wait.h>
#endif

#include "check.h"
#include "system.h"
#include "threads.h"

enum { MAX_ITEMS = 500, MAX_THREADS = 8 };

typedef struct {
    atomic_int next, threads;
    int num_items;
    int done[MAX_ITEMS]; /* plain ints: two writers of one would be a race */
} region;

static void take_items(void *argument, int thread_index)
{
    region *r = argument;
    REQUIRE(thread_index >= 0 && thread_index < MAX_THREADS);
    atomic_fetch_add(&r->threads, 1);
    for (int i; (i = atomic_fetch_add(&r->next, 1)) < r->num_items;)
        r->done[i]++;
}

static void run_region(int num_threads, int num_items)
{
    region r = {.num_items = num_items};
    fa_parallel(num_threads, take_items, NULL, &r);
    /* The workers' writes are visible here, or this is a race. */
    for (int i = 0; i < num_items; i++)
        REQUIRE(r.done[i] == 1);
    REQUIRE(atomic_load(&r.threads) >= 1 && atomic_load(&r.threads) <= (num_threads > 1 ? num_threads : 1));
}

static void run_many_regions(void)
{
    for (int i = 0; i < 400; i++)
        run_region(1 + i % MAX_THREADS, i % MAX_ITEMS);
    /* Longer than the spin, so that both sides have gone to sleep. */
    for (int i = 0; i < 20; i++) {
        usleep(2000);
        run_region(4, 100);
    }
}

static void sleep_in_task(void *argument, int thread_index)
{
    if (thread_index > 0)
        usleep(2000);
    take_items(argument, thread_index);
}

static void run_slow_workers(void)
{
    for (int i = 0; i < 20; i++) {
        region r = {.num_items = 50};
        fa_parallel(3, sleep_in_task, NULL, &r);
        for (int n = 0; n < r.num_items; n++)
            REQUIRE(r.done[n] == 1);
    }
}

static void nest(void *argument, int thread_index)
{
    (void)argument;
    (void)thread_index;
    region inner = {.num_items = 10};
    fa_parallel(4, take_items, NULL, &inner);
    REQUIRE(atomic_load(&inner.threads) == 1);
    REQUIRE(inner.done[0] == 1 && inner.done[9] == 1);
}

static void *call_often(void *unused)
{
    for (int i = 0; i < 200; i++)
        run_region(1 + i % 4, 64);
    return unused;
}

static void run_simultaneous_callers(void)
{
    pthread_t callers[4];
    for (int i = 0; i < 4; i++)
        REQUIRE(pthread_create(&callers[i], NULL, call_often, NULL) == 0);
    for (int i = 0; i < 4; i++)
        REQUIRE(pthread_join(callers[i], NULL) == 0);
}

static void use_scratch(void *argument, int thread_index)
{
    size_t bytes = *(size_t *)argument;
    unsigned char *scratch = fa_take_scratch(bytes);
    REQUIRE(scratch && (uintptr_t)scratch % 64 == 0);
    memset(scratch, thread_index + 1, bytes);
    unsigned char *second = fa_take_scratch(2 * bytes); /* a call within the call */
    REQUIRE(second && (uintptr_t)second % 64 == 0);
    memset(second, 0, 2 * bytes);
    usleep(200);
    fa_give_back_scratch(second);
    for (size_t i = 0; i < bytes; i++)
        REQUIRE(scratch[i] == thread_index + 1);
    fa_give_back_scratch(scratch);
    REQUIRE(fa_take_scratch(bytes / 2) == (void *)scratch);
    fa_give_back_scratch(scratch);
}

static float third(void)
{
    volatile float one = 1;
    return one / 3;
}

static void compare_third(void *argument, int thread_index)
{
    (void)thread_index;
    usleep(200); /* so that each thread has a part */
    REQUIRE(third() == *(float *)argument);
}

static void check_float_mode(void)
{
    float nearest = third();
    fa_parallel(4, compare_third, NULL, &nearest);
    REQUIRE(fesetround(FE_DOWNWARD) == 0);
    float down = third();
    REQUIRE(down < nearest);
    fa_parallel(4, compare_third, NULL, &down);
    REQUIRE(fesetround(FE_TONEAREST) == 0);
    fa_parallel(4, compare_third, NULL, &nearest);
}

#ifdef _WIN32

static void run_in_forked_child(void) {}

#else

static void run_in_forked_child(void)
{
    pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        limit_time();
        for (int i = 0; i < 50; i++)
            run_region(4, 100);
        _exit(0);
    }
    int status;
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

#endif

int main(void)
{
    limit_time();
    run_many_regions();
    run_slow_workers();
    fa_parallel(4, nest, NULL, NULL);
    run_simultaneous_callers();
    for (size_t bytes = 64; bytes <= 1 << 16; bytes *= 4)
        fa_parallel(4, use_scratch, NULL, &bytes);
    check_float_mode();
    run_in_forked_child();
    run_many_regions();
    return 0;
}

/* What the tests in C need of an operating system. */
#ifndef FA_TESTS_SYSTEM_H
#define FA_TESTS_SYSTEM_H

#include <pthread.h>
#include <unistd.h>

#include "check.h"

/* A hang is a failure; the limit is far above what the slowest machine takes. */
#define TIME_LIMIT_SECONDS 600

#ifdef _WIN32

static inline void *end_in_time(void *unused)
{
    sleep(TIME_LIMIT_SECONDS);
    REQUIRE(unused, "a hang");
    return unused;
}

static inline void limit_time(void)
{
    pthread_t watcher;
    REQUIRE(pthread_create(&watcher, NULL, end_in_time, NULL) == 0);
}

#else

static inline void limit_time(void)
{
    alarm(TIME_LIMIT_SECONDS);
}

#endif

#endif

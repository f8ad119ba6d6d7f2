/* A request to give up: what the threads of a call share of it, and what each has for itself. */
#ifndef FA_STOP_H
#define FA_STOP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One for each thread. `requested` is common to all threads of the call; only the thread that made the call
 * has `interrupted`, which it asks now and then, and which it answers by a request to all. */
typedef struct {
    atomic_bool *requested;
    bool (*interrupted)(void *argument); /* NULL: never asked */
    void *argument;
    int64_t next_poll; /* in nanoseconds; 0: the clock has not been read yet */
    unsigned calls;
} fa_stop;

/* For a kernel between two key blocks; true: give up, the results no longer matter. */
bool fa_should_stop(fa_stop *stop);

#endif

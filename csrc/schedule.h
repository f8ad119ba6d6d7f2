/* Shares indices out among threads. It knows nothing of what is done for them. */
#ifndef FA_SCHEDULE_H
#define FA_SCHEDULE_H

#include "stop.h"

typedef struct fa_schedule fa_schedule;

/* A thread that works through indices. */
typedef struct {
    int64_t index; /* the one to work on */
    int64_t next;  /* the one after it, if this thread has popped it already; else -1 */
    int thread_index;
    fa_stop stop;
    fa_schedule *schedule;
    int queue; /* that it pops from */
} fa_worker;

/* Calls work(argument, worker) once on each of at most `num_threads` threads, as fa_parallel does, which
 * together have each index of [0, num_indices) exactly once, by fa_next_index. The thread of the caller asks
 * interrupted(argument), if there is one, now and then; true: the threads are to stop. Returns false if they
 * were. */
bool fa_run_schedule(int num_threads, int64_t num_indices, void (*work)(void *argument, fa_worker *worker),
                     bool (*interrupted)(void *argument), void *argument);

/* Moves on to the thread's next index; false if none is left, or if the threads are to stop. A thread that
 * returns before leaves what it has not been given to the others, but for `next`. */
bool fa_next_index(fa_worker *worker);

#endif

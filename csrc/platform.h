/* What the library needs of an operating system: platform_posix.c and platform_win32.c provide it. */
#ifndef FA_PLATFORM_H
#define FA_PLATFORM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Threads of the pool, the caller included. */
#define FA_MAX_THREADS 1024

/* The time of a clock that only goes forward. */
int64_t fa_nanoseconds(void);

/* CPUs that the calling thread may run on; at least 1. */
int fa_affinity_cpus(void);

/* Starts a thread that ends with the process: run(thread_index), whose index is 1 or more. Where there are
 * signals, it blocks them, because Python handles them in the main thread, but for those of its own faults.
 * false: it was not created. */
bool fa_start_thread(int thread_index, void (*run)(int thread_index));

/* The pool's lock, and with it a condition variable for each thread by its index; 0 is the caller's. A wait
 * is made with the lock held, which is free meanwhile, and may end without a signal. */
void fa_lock_pool(void);
void fa_unlock_pool(void);
void fa_wait(int thread_index);
/* false: so many nanoseconds have passed without a signal. */
bool fa_wait_for(int thread_index, int64_t nanoseconds);
void fa_signal(int thread_index);

/* After a fork, the child has the lock free again, and calls `reset`. Its only thread is the one that forked.
 * To be called once, when the library is loaded: a fork may come at any time after. Nothing where there is no
 * fork. */
void fa_on_fork(void (*reset)(void));

/* Memory aligned to 64 bytes; NULL if there is none. */
void *fa_allocate(size_t bytes);
void fa_free(void *data);
/* The end of the calling thread frees `data`, in place of what was given here before. */
void fa_free_with_thread(void *data);

#endif

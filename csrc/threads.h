/* A small pool of threads. It knows nothing of attention. */
#ifndef FA_THREADS_H
#define FA_THREADS_H

#include <stddef.h>

/* Calls task(argument, thread_index) once on each of at most `num_threads` threads, for the indices 0 (the
 * caller), 1, ...; returns when all calls have returned. There may be fewer threads than asked for: inside a
 * task, while another thread uses the pool, or where threads cannot be created, the caller is alone. So the
 * threads must share the work out among themselves. While the caller waits for the others it calls
 * idle(argument), if there is one, some times a second. All compute in the caller's float mode. */
void fa_parallel(int num_threads, void (*task)(void *argument, int thread_index),
                 void (*idle)(void *argument), void *argument);

/* At least `bytes`, 64-byte aligned, until it is given back; NULL if there is no memory. A thread keeps one
 * buffer for its next call. A second one, taken by a call within a call (a signal handler of Python's may
 * make one), lives until it is given back. */
void *fa_take_scratch(size_t bytes);
void fa_give_back_scratch(void *data);

#endif

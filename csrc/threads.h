/* A small pool of threads. It knows nothing of attention. */
#ifndef FA_THREADS_H
#define FA_THREADS_H

#include <stdbool.h>
#include <stddef.h>

/* Calls task(argument, member) once on each of at most `num_threads` threads, for members 0 (the
 * caller), 1, ...; returns when all calls have returned. There may be fewer members than asked for:
 * inside a task, while another thread uses the pool, or where threads cannot be created, the caller is
 * alone. So the members must share the work out among themselves. */
void fa_parallel(int num_threads, void (*task)(void *argument, int member), void *argument);

/* The calling thread's own buffer of at least `bytes`, 64-byte aligned, kept for its next call and freed
 * with the thread; NULL if there is no memory. */
void *fa_thread_scratch(size_t bytes);

#endif

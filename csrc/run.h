/* Runs the items of a call on the pool. */
#ifndef FA_RUN_H
#define FA_RUN_H

#include "kernel.h"
#include "schedule.h"

/* Calls compute(argument, worker, scratch) once on each of at most `num_threads` threads, which together have
 * each of `num_items` indices by fa_next_index; in the float mode of the problem's kernels, and each with
 * `scratch_bytes` of its own. */
fa_status fa_run(const fa_problem *problem, int num_threads, int64_t num_items, size_t scratch_bytes,
                 void (*compute)(const void *argument, fa_worker *worker, void *scratch),
                 const void *argument);

#endif

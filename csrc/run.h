/* Runs the items of a call on the pool. */
#ifndef FA_RUN_H
#define FA_RUN_H

#include "fastattn.h"
#include "schedule.h"

/* Items, and what the threads that compute them need. */
typedef struct {
    int num_threads; /* at most */
    int64_t num_items;
    size_t scratch_bytes;      /* for each thread */
    bool flushes_subnormals;   /* the float mode; see float_mode.h */
    bool (*interrupted)(void); /* called now and then, by the calling thread only; may be NULL */
} fa_job;

/* Calls compute(argument, worker, scratch) once on each of the threads, which together have each index by
 * fa_next_index. */
fa_status fa_run(const fa_job *job, void (*compute)(const void *argument, fa_worker *worker, void *scratch),
                 const void *argument);

#endif

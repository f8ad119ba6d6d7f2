/* Which kernel serves a problem, and what a kernel is. */
#ifndef FA_DISPATCH_H
#define FA_DISPATCH_H

#include <stdatomic.h>

#include "fastattn.h"

/* A unit of work: query rows [row_begin, row_end) of one batch item and kv head. The rows of a group
 * are numbered position by position: row = position * group + head in the group. */
typedef struct {
    int64_t batch_index[FA_MAX_BATCH_DIMS];
    int64_t kv_head;
    int64_t row_begin, row_end;
} fa_item;

/* Asked by a kernel between key blocks; true: give up, the results no longer matter. */
typedef struct {
    atomic_bool stop;
    const fa_problem *problem;
} fa_run;

bool fa_should_stop(fa_run *run, bool is_caller);

typedef struct {
    const char *isa;
    const char *name;
    int lanes; /* query rows in a vector */
    int max_vectors;
    int key_block;
    /* Bytes of scratch for an item of `tiles` tiles. */
    size_t (*scratch_bytes)(const fa_problem *problem, int tiles);
    /* Computes the item; `next` (or NULL) is the one that this thread computes after it, whose first
     * reads are started early. `scratch` is 64-byte aligned. */
    void (*forward)(const fa_problem *problem, const fa_item *item, const fa_item *next, void *scratch,
                    fa_run *run, bool is_caller);
    /* Runs `rounds` rounds of the micro-kernel's multiply-adds in registers; returns FLOPs done. */
    double (*peak)(int64_t rounds);
} fa_kernel;

const fa_kernel *fa_select_kernel(const fa_problem *problem);
/* The kernel that computes in the precision of `dtype`. */
const fa_kernel *fa_kernel_for_dtype(fa_dtype dtype);

#endif

/* The work partition: how a problem becomes items, and how many threads it is worth. */
#ifndef FA_PLAN_H
#define FA_PLAN_H

#include "dispatch.h"

typedef struct {
    int64_t rows_per_group; /* query rows of one batch item and kv head */
    int64_t rows_per_item;
    int64_t items_per_group;
    int64_t num_groups; /* batch items × kv heads */
    int tiles_per_item;
    int num_threads;
    size_t scratch_bytes;
} fa_partition;

fa_partition fa_partition_problem(const fa_problem *problem, const fa_kernel *kernel);

/* The item of a given index, 0 <= index < num_groups * items_per_group. */
fa_item fa_item_at(const fa_problem *problem, const fa_partition *partition, int64_t index);

#endif

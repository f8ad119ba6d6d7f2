/* The work partition: how a problem becomes items, and how many threads it is worth. */
#ifndef FA_PLAN_H
#define FA_PLAN_H

#include "kernel.h"

/* How one head group, the queries of a sequence that share a kv head, becomes items. */
typedef struct {
    const fa_kernel *kernel;
    int64_t rows_per_item;
    int64_t num_row_items;
    int64_t split_keys, first_split, num_splits;
    int64_t split_rows;   /* of the backward pass, whose splits are of rows */
    bool shares_splits;   /* each split is an item */
    size_t partial_bytes; /* of a split that is */
} fa_group_plan;

/* Items, and bytes of partial results, of all sequences before one. */
typedef struct {
    int64_t items;
    size_t partial_bytes;
} fa_prefix;

typedef struct {
    int64_t num_sequences;
    int64_t num_items;
    int64_t max_splits;
    int tiles_per_item;
    double work_per_item; /* the splits of a group with more work are items of their own */
    int num_threads;
    size_t scratch_bytes;     /* per thread */
    size_t shared_bytes;      /* for the partial results of split groups */
    fa_prefix *prefixes;      /* of each sequence and after the last; NULL: sequences are uniform, and */
    fa_sequence sequence;     /* each is this one, */
    fa_group_plan group_plan; /* with this plan */
} fa_partition;

/* false: no memory. */
bool fa_partition_problem(const fa_problem *problem, fa_partition *partition);
void fa_free_partition(fa_partition *partition);

/* The item of a given index, 0 <= index < num_items, and its kernel. `shared` is shared_bytes of zeros. */
const fa_kernel *fa_item_at(const fa_problem *problem, const fa_partition *partition, int64_t index,
                            char *shared, fa_work_item *item);

/* What a batch item is. */
fa_sequence fa_sequence_at(const fa_problem *problem, const int64_t *batch_index);

/* Whether two items differ in nothing but the addresses of their arrays. */
bool fa_same_geometry(const fa_work_item *a, const fa_work_item *b);

#endif

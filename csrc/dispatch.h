/* Which kernel serves a problem, and what a kernel is. */
#ifndef FA_DISPATCH_H
#define FA_DISPATCH_H

#include <stdatomic.h>

#include "fastattn.h"

/* What one batch item attends. */
typedef struct {
    int64_t num_queries, num_keys;
    int64_t first_query, first_key; /* rows before it in packed arrays, else 0 */
    int64_t query_offset;
    int64_t key_lo, key_hi; /* keys that some query sees, by position, lie in [key_lo, key_hi) */
} fa_sequence;

/* A unit of work: query rows [row_begin, row_end) of one sequence and kv head, over the keys of the splits
 * [split_begin, split_end). The rows of a group are numbered position by position:
 * row = position * group + head in the group.
 *
 * A group of few rows has its keys split at multiples of split_keys. Each split is a softmax of its own, and
 * they are merged in order, here or, if `partials` is not NULL, by whoever finishes the last of them. So
 * results depend on the splits and not on who computed them. */
typedef struct {
    int64_t batch_index[FA_MAX_BATCH_DIMS];
    fa_sequence sequence;
    int64_t kv_head;
    int64_t row_begin, row_end;
    int64_t split_keys; /* a multiple of FA_KEY_BLOCK */
    int64_t split_begin, split_end;
    int64_t first_split, num_splits; /* of the whole group */
    char *partials;                  /* num_splits of them, of kernel->partial_bytes(rows) each */
    _Atomic int64_t *splits_done;    /* of the group */
    bool same_geometry; /* rows, keys and splits are those of the item that used the same scratch before */
} fa_work_item;

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
    bool flushes_subnormals; /* runs where they are taken for 0; see float_mode.h */
    int max_tiles;           /* of an item; they share every key block, and what is packed of it */
    int items_per_thread;    /* at least, where there is so much work: some threads wait for the last ones */
    bool splits_many_rows;   /* keys of a group of many rows, too, to keep sums short */
    int decode_rows;         /* a group of at most so many rows is worked on with lanes along its keys */
    /* Bytes of scratch for an item of `tiles` tiles, and of the partial result of a tile of `rows` rows. */
    size_t (*scratch_bytes)(const fa_problem *problem, int tiles);
    size_t (*partial_bytes)(const fa_problem *problem, int64_t rows);
    /* Computes the item; `next` (or NULL) is the one that this thread computes after it, whose first
     * reads are started early. `scratch` is 64-byte aligned, and stays between items that are alike. */
    void (*forward)(const fa_problem *problem, const fa_work_item *item, const fa_work_item *next,
                    void *scratch, fa_run *run, bool is_caller);
    /* Runs `rounds` rounds of the micro-kernel's multiply-adds in registers; returns FLOPs done. */
    double (*peak)(int64_t rounds);
    /* Reads all bytes, by whole vectors; what is returned depends on each of them. */
    uint64_t (*read)(const char *data, size_t bytes, bool prefetches);
} fa_kernel;

/* Whether lines of keys and values are best asked for into L1, rather than L2: so on Zen 5, where a line in
 * L2 waits a second time for one of the places for what L1 has missed. Zen 4 reads a quarter to a half more
 * for four query rows by way of L2.
 */
bool fa_prefetch_to_l1(void);

const fa_kernel *fa_select_kernel(const fa_problem *problem);
/* The kernel that computes in the precision of `dtype`. */
const fa_kernel *fa_kernel_for_dtype(fa_dtype dtype);

#endif

/* What a kernel is: the work item that it computes, and its entry in the table of dispatch.c.
 *
 * Every kernel in csrc/isa/ includes this header, and so do plan.c, which makes work items, and attend.c,
 * which hands them to kernels. */
#ifndef FA_KERNEL_H
#define FA_KERNEL_H

#include "fastattn.h"
#include "stop.h"

/* The queries and keys of one sequence. */
typedef struct {
    int64_t num_queries, num_keys;
    int64_t first_query, first_key; /* rows before it in packed arrays, else 0 */
    int64_t query_offset;
    int64_t key_lo, key_hi; /* keys that some query sees, by position, lie in [key_lo, key_hi) */
} fa_sequence;

/* A unit of work: query rows [row_begin, row_end) of one sequence and kv head, over the keys of the splits
 * [split_begin, split_end). The rows of a head group are numbered position by position:
 * row = position * group_size + head in the group.
 *
 * Keys are split at multiples of split_keys. Each split is a softmax of its own. The splits of a group are
 * merged in order: by the item that has all of them or, if `partials` is not NULL, by the item that finishes
 * last. So results depend on the splits and not on the threads that computed them.
 *
 * In the backward pass rows are split, at multiples of split_rows, and not keys: the gradients of keys and
 * values are sums over the splits. */
typedef struct {
    int64_t batch_index[FA_MAX_BATCH_DIMS];
    fa_sequence sequence;
    int64_t kv_head;
    int64_t row_begin, row_end;
    int64_t split_keys; /* a multiple of FA_KEY_BLOCK */
    int64_t split_rows;
    int64_t split_begin, split_end;
    int64_t first_split, num_splits; /* of the whole group */
    char *partials;                  /* num_splits of them */
    _Atomic int64_t *splits_done;    /* of the group */
    bool same_geometry; /* rows, keys and splits are those of the item that used the same scratch before */
} fa_work_item;

/* Keys [lo, hi); empty if lo >= hi. */
typedef struct {
    int64_t lo, hi;
} fa_interval;

/* Of the gradient of a bias: rows [row_begin, row_end) of it and some keys. `work` says which batch item and
 * rows of the query head contribute now, a tile at most. */
typedef struct {
    fa_work_item work;
    int64_t head;
    int64_t row_begin, row_end;
    fa_interval keys;
} fa_bias_item;

/* A row of results to be merged. */
typedef struct {
    const char *data;
    ptrdiff_t col;
    double weight;
} fa_weighted_row;

typedef struct {
    const char *isa;
    const char *name;
    int lanes; /* query rows in a vector */
    int max_vectors;
    bool flushes_subnormals; /* computes in a float mode that takes them for 0; see float_mode.h */
    int max_tiles;           /* of an item; they share every key block, and what is packed of it */
    int items_per_thread;    /* at least, where there is so much work: some threads wait for the last ones */
    bool splits_many_rows;   /* keys of a large group, too, to keep sums short */
    int decode_rows;         /* a head group of at most so many rows has a decode tile */
    bool decodes_int8;       /* of bfloat16: its decode tiles take int8 keys, too */
    /* Bytes of scratch for an item of `tiles` tiles, and of the partial result of a tile of `rows` rows. */
    size_t (*scratch_bytes)(const fa_problem *problem, int tiles);
    size_t (*partial_bytes)(const fa_problem *problem, int64_t rows);
    /* Computes the item. `next` (or NULL) is the item that this thread computes after it, whose first rows
     * are prefetched. `scratch` is 64-byte aligned, and keeps its contents between items of the same
     * geometry. */
    void (*forward)(const fa_problem *problem, const fa_work_item *item, const fa_work_item *next,
                    void *scratch, fa_stop *stop);
    bool softmax_beside_products; /* of wide tiles: another unit computes them */

    /* The backward pass; NULL in a kernel of parts. Rows of a head group that are worked
     * on together; scratch for keys [key_lo, key_hi), with so many sums of their gradients (0: in partials;
     * 2: of a split and of all) of `sum_bytes`. */
    void (*backward)(const fa_problem *problem, const fa_work_item *item, void *scratch, fa_stop *stop);
    int64_t (*backward_rows)(const fa_problem *problem);
    size_t (*backward_scratch_bytes)(const fa_problem *problem, int64_t key_lo, int64_t key_hi, int num_sums);
    size_t (*sum_bytes)(const fa_problem *problem, int64_t key_lo, int64_t key_hi);
    /* An item of the bias's gradient: begins, adds the rows of `work`, and so on, and stores. `keys`: of an
     * item, at most. */
    size_t (*bias_scratch_bytes)(const fa_problem *problem, int64_t keys);
    void (*begin_bias_gradient)(const fa_problem *problem, const fa_bias_item *item, void *scratch);
    void (*add_bias_gradient)(const fa_problem *problem, const fa_bias_item *item, void *scratch,
                              fa_stop *stop);
    void (*store_bias_gradient)(const fa_problem *problem, const fa_bias_item *item, void *scratch);

    /* Stores the weighted sum of `count` rows; in kernels for float32 and float64 alone. */
    void (*mix_rows)(const fa_merge_problem *problem, const fa_weighted_row *rows, int64_t count, char *out);

    /* Run so many rounds, in registers, of the multiply-adds of wide tiles or of decode tiles, and return
     * FLOPs of attention done; or of the softmax, and return scores done. */
    double (*peak)(int64_t rounds), (*decode_peak)(int64_t rounds), (*softmax_peak)(int64_t rounds);
    /* Reads all bytes, by whole vectors; the result depends on each of them. */
    uint64_t (*read)(const char *data, size_t bytes, bool prefetches);
} fa_kernel;

static inline int64_t fa_clamp(int64_t x, int64_t lowest, int64_t highest)
{
    return x < lowest ? lowest : x > highest ? highest : x;
}

/* Whether a head group of so many rows has a decode tile, where a kernel has one for up to `decode_rows`.
 * Dropout and gradients have lanes of rows. */
static inline bool fa_is_decode(const fa_problem *p, int64_t rows, int decode_rows)
{
    return rows <= decode_rows && p->dropout == 0 && !p->gradients;
}

/* The keys, of `num_keys`, that the window lets a query at `position` see. A causal mask is the window's
 * right = 0. */
static inline fa_interval fa_row_interval(const fa_problem *p, int64_t position, int64_t num_keys)
{
    return (fa_interval){
        .lo = p->left == FA_UNBOUNDED ? 0 : fa_clamp(position - p->left, 0, num_keys),
        .hi = p->right == FA_UNBOUNDED ? num_keys : fa_clamp(position + p->right + 1, 0, num_keys),
    };
}

#endif

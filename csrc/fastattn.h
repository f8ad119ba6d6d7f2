/* fastattn: exact multi-head attention, softmax(Q Kᵀ · scale + bias) V, fused in one pass.
 *
 * The only public header of the C library. The caller validates: every extent, stride and pointer
 * here is trusted. A status reports only what the caller cannot know beforehand. */
#ifndef FASTATTN_H
#define FASTATTN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FA_MAX_BATCH_DIMS 16
#define FA_MAX_HEAD_DIM 512
#define FA_UNBOUNDED (-1)

/* Keys between two updates of the online softmax. A page holds a multiple of them. */
#define FA_KEY_BLOCK 64

/* The same for decode tiles, of a few query rows. A single block gives them few scores, and the update waits
 * until all are there. */
#define FA_DECODE_KEYS (4 * FA_KEY_BLOCK)

/* Of queries, keys, values, bias and results; dtypes.h says more of each. */
typedef enum { FA_FLOAT32, FA_FLOAT64, FA_FLOAT16, FA_BFLOAT16, FA_INT8 } fa_dtype;

typedef enum { FA_OK, FA_NO_MEMORY, FA_INTERRUPTED } fa_status;

/* An array of (batch..., head, row, col), strides in bytes and 0 along broadcast axes. */
typedef struct {
    char *data;     /* NULL: the argument is absent */
    fa_dtype dtype; /* where that is not known by what the array is */
    ptrdiff_t batch[FA_MAX_BATCH_DIMS];
    ptrdiff_t head, row, col;
    ptrdiff_t page; /* of keys and values in pages, instead of the batch strides */
} fa_array;

/* The gradients of a problem's results -> those of its arguments, in the axes of these. lse and out are then
 * arguments, of these keys or of more. delta, each row's Σ grad_out · out - grad_lse, is a by-product. */
typedef struct {
    fa_array grad_out, grad_lse; /* like out and lse; no grad_lse: 0 */
    fa_array grad_query, grad_key, grad_value;
    fa_array grad_bias; /* of the bias's own shape, strides 0 where it was broadcast; may be absent */
    fa_array delta;     /* like lse; may be absent */
} fa_gradients;

/* Attention of a batch of sequences. The queries and keys of a sequence are rows of (batch..., head, row,
 * col). In a packed problem, which has one batch axis, they are rows cu_seqlens[b] to cu_seqlens[b + 1] of
 * (head, row, col). Where keys are in pages, row n is in page page_table[b][n / page_size] of
 * (page, head, row, col). */
typedef struct {
    int batch_ndim;
    int64_t batch_shape[FA_MAX_BATCH_DIMS];
    int64_t num_heads, num_kv_heads; /* a kv head's group_size: num_heads / num_kv_heads */
    int64_t seqlen_q, seqlen_k;      /* of the longest sequence */
    int64_t head_dim, head_dim_v;

    fa_array query, key, value;
    fa_array mask, bias;                /* booleans; any float dtype */
    fa_array alibi_slopes, sinks;       /* FA_FLOAT64 (batch..., head) */
    fa_array key_scale, value_scale;    /* FA_FLOAT32 (..., head, row): factors of FA_INT8 keys and values */
    fa_array key_lengths, query_offset; /* int64 (batch...) */
    fa_array out, lse, weights;         /* lse is (batch..., head, row); weights start as zeros */
    bool adds; /* out and lse are there of other keys, which these join; out is then as precise as sums */

    /* In place of all weights, each row's largest ones, and column sums over the rows. top_count is 0, and
     * column_sums absent, where they are not wanted. Column sums start as zeros; each weight adds itself
     * times fixed_point_scale, rounded. */
    int64_t top_count;
    fa_array top_indices, top_weights; /* int64, query's dtype (batch..., head, row, col) */
    fa_array column_sums;              /* int64 (batch..., head, col) */
    double fixed_point_scale;

    const int64_t *cu_seqlens_q, *cu_seqlens_k; /* of batch_shape[0] + 1; NULL: not packed */
    fa_array page_table;                        /* int64 (batch..., page), contiguous along its pages */
    int64_t page_size;

    double scale;
    double softcap;            /* 0: none */
    double dropout;            /* share of the probabilities that are dropped; 0: none */
    uint64_t seed;             /* which ones */
    int64_t left, right;       /* query position p sees keys p - left .. p + right; FA_UNBOUNDED */
    int num_threads;           /* at most this many */
    bool (*interrupted)(void); /* called now and then, by the calling thread only; may be NULL */

    const fa_gradients *gradients; /* what the backward pass reads and writes; NULL: the forward pass */
} fa_problem;

/* What fa_forward does with a problem. */
typedef struct {
    const char *isa;
    const char *kernel;
    bool is_decode;     /* the tiles are decode tiles */
    int tile_rows;      /* query rows of a full tile */
    int key_block;      /* keys between two updates of the online softmax */
    int tiles_per_item; /* tiles that share a key block */
    int64_t num_splits; /* parts of a sequence's keys whose results are merged; the most of any sequence */
    int64_t num_items;  /* work items, which threads share out */
    int num_threads;
    size_t scratch_bytes; /* per thread */
    size_t shared_bytes;  /* of partial results */
} fa_plan;

/* What fa_forward, or with gradients fa_backward, would do; FA_OK or FA_NO_MEMORY. */
fa_status fa_plan_problem(const fa_problem *problem, fa_plan *plan);
fa_status fa_forward(const fa_problem *problem);
/* All but grad_bias, which fa_bias_gradient computes. */
fa_status fa_backward(const fa_problem *problem);
fa_status fa_bias_gradient(const fa_problem *problem);

/* Results over disjoint sets of keys, and the one over all of them. */
typedef struct {
    int batch_ndim;
    int64_t batch_shape[FA_MAX_BATCH_DIMS];
    int64_t num_heads, seqlen, columns;
    int64_t num_sets;            /* at least 1 */
    const fa_array *outs, *lses; /* of one dtype; float32 or float64, without columns */
    fa_array out, lse;           /* out may be one of the outs */
    int num_threads;
    bool (*interrupted)(void); /* as in a problem */
} fa_merge_problem;

fa_status fa_merge(const fa_merge_problem *problem);

/* An instruction set that there are kernels for, what it needs, and whether CPU and operating system have it.
 */
typedef struct {
    const char *name, *needs;
    bool is_supported;
} fa_isa;

/* The instruction set of this index, of 0 for the best up to the baseline; false beyond. */
bool fa_describe_isa(int index, fa_isa *isa);
const char *fa_selected_isa(void);
/* Restricts dispatch to an instruction set and those below it; false if this CPU lacks it. */
bool fa_select_isa(const char *name);

/* Whether float32 and float16 are split into bfloat16, if the instruction set has a unit for these: at first
 * where that is faster. Always is for tests. */
typedef enum { FA_SPLIT_NEVER, FA_SPLIT_IF_FASTER, FA_SPLIT_ALWAYS } fa_split_mode;

void fa_set_split_mode(fa_split_mode mode);
/* Whether some are. */
bool fa_splits(void);

#ifdef _WIN32
#define FA_EXPORT __declspec(dllexport)
#else
#define FA_EXPORT __attribute__((visibility("default")))
#endif

/* Visible in the built module: threadpoolctl recognises it by them. */
FA_EXPORT int fa_get_num_threads(void);
FA_EXPORT void fa_set_num_threads(int num_threads);
/* CPUs this process may use, by affinity and control group. */
int fa_available_cpus(void);

/* Multiply-add rate of the kernel that serves `dtype`, in FLOP/s. */
double fa_measure_peak(fa_dtype dtype, int num_threads);

/* What a kernel can do at most. */
typedef struct {
    double flops;           /* FLOP/s of its products */
    double scores;          /* /s through its softmax */
    bool runs_side_by_side; /* whether other units compute the one and the other */
} fa_limits;

/* Of the kernel that a plan names, for its decode tiles or its wide ones; false if there is none of that name
 * in the instruction set in use. */
bool fa_measure_limits(const char *kernel, bool is_decode, int num_threads, fa_limits *limits);

/* Read rate over `bytes` at `data`, in bytes/s. */
double fa_measure_bandwidth(const void *data, size_t bytes, int num_threads);

#endif

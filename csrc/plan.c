#include "plan.h"

/* Scratch stays within the L2 cache and within what a caller may expect. */
#define MAX_SCRATCH_BYTES (1 << 20)

/* Tiles of an item share every key block: fewer reads of K and V beyond L2, and staging, where it is
 * needed, is paid once for all. Four are enough for that. */
#define MAX_TILES_PER_ITEM 4

/* Enough items that the last ones, which some threads wait for, are a small share. */
#define ITEMS_PER_THREAD 24

/* A region costs some microseconds to start on another thread; this much work takes about that long. */
#define MULTIPLY_ADDS_PER_THREAD 200000.0

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t count_groups(const fa_problem *p)
{
    int64_t groups = p->num_kv_heads;
    for (int axis = 0; axis < p->batch_ndim; axis++)
        groups *= p->batch_shape[axis];
    return groups;
}

fa_partition fa_partition_problem(const fa_problem *p, const fa_kernel *kernel)
{
    fa_partition part = {.num_groups = count_groups(p)};
    if (p->num_heads == 0 || p->seqlen_q == 0 || part.num_groups == 0)
        return (fa_partition){.rows_per_item = 1, .tiles_per_item = 1, .num_threads = 1};
    part.rows_per_group = p->seqlen_q * (p->num_heads / p->num_kv_heads);

    double keys = p->left != FA_UNBOUNDED && p->right != FA_UNBOUNDED && p->left + p->right < p->seqlen_k
                      ? (double)(p->left + p->right + 1)
                      : (double)p->seqlen_k;
    double multiply_adds =
        (double)part.num_groups * (double)part.rows_per_group * keys * (double)(p->head_dim + p->head_dim_v);
    double useful = multiply_adds / MULTIPLY_ADDS_PER_THREAD;
    part.num_threads = useful < p->num_threads ? (int)useful : p->num_threads;
    if (part.num_threads < 1)
        part.num_threads = 1;

    const int64_t tile_rows = (int64_t)kernel->lanes * kernel->max_vectors;
    const int64_t tiles = ceil_div(part.rows_per_group, tile_rows);
    int tiles_per_item = MAX_TILES_PER_ITEM;
    while (tiles_per_item > 1 &&
           (kernel->scratch_bytes(p, tiles_per_item) > MAX_SCRATCH_BYTES ||
            part.num_groups * ceil_div(tiles, tiles_per_item) < ITEMS_PER_THREAD * (int64_t)part.num_threads))
        tiles_per_item--;

    /* Items of whole vectors, as even as they can be. */
    const int64_t vectors = ceil_div(part.rows_per_group, kernel->lanes);
    const int64_t items = ceil_div(vectors, (int64_t)tiles_per_item * kernel->max_vectors);
    part.rows_per_item = ceil_div(vectors, items) * kernel->lanes;
    part.items_per_group = ceil_div(part.rows_per_group, part.rows_per_item);
    part.tiles_per_item = (int)ceil_div(part.rows_per_item, tile_rows);
    part.scratch_bytes = kernel->scratch_bytes(p, part.tiles_per_item);
    int64_t num_items = part.num_groups * part.items_per_group;
    if (part.num_threads > num_items)
        part.num_threads = (int)num_items;
    return part;
}

/* Items of a group follow each other, so that a thread finds its keys in cache; later rows first,
 * because under a causal mask they are the longer ones, and the last items should be short. */
fa_item fa_item_at(const fa_problem *p, const fa_partition *part, int64_t index)
{
    fa_item item;
    int64_t group = index / part->items_per_group;
    int64_t position = part->items_per_group - 1 - index % part->items_per_group;
    item.row_begin = position * part->rows_per_item;
    item.row_end = item.row_begin + part->rows_per_item;
    if (item.row_end > part->rows_per_group)
        item.row_end = part->rows_per_group;
    item.kv_head = group % p->num_kv_heads;
    int64_t batch = group / p->num_kv_heads;
    for (int axis = p->batch_ndim - 1; axis >= 0; axis--) {
        item.batch_index[axis] = batch % p->batch_shape[axis];
        batch /= p->batch_shape[axis];
    }
    return item;
}

fa_plan fa_plan_forward(const fa_problem *problem)
{
    const fa_kernel *kernel = fa_select_kernel(problem);
    fa_partition part = fa_partition_problem(problem, kernel);
    return (fa_plan){
        .isa = kernel->isa,
        .kernel = kernel->name,
        .tile_rows = kernel->lanes * kernel->max_vectors,
        .key_block = kernel->key_block,
        .tiles_per_item = part.tiles_per_item,
        .num_items = part.num_groups * part.items_per_group,
        .num_threads = part.num_threads,
        .scratch_bytes = part.scratch_bytes,
    };
}

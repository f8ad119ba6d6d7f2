#include "plan.h"

#include <stdlib.h>

#include "cpu.h"
#include "dispatch.h"

/* Scratch stays within the L2 cache and within what a caller may expect. */
#define MAX_SCRATCH_BYTES (1 << 20)

/* So small a share of all work is not worth cutting further. */
#define MIN_WORK_SHARE (1.0 / 24)

/* To start another thread's part takes some microseconds; this much work takes about as long. */
#define MULTIPLY_ADDS_PER_THREAD 200000.0

/* To read a key and its value from memory takes about as long as the multiply-adds of so many rows. */
#define ROWS_PER_KEY_READ 4

/* Keys of a split in a group that is one tile. A merge costs about as much as two keys. More splits than
 * MAX_SPLITS would balance the threads no better, and their partial results take memory. */
#define MIN_SPLIT_KEYS 512
#define MAX_SPLITS 32

/* Keys of a split in a larger group, whose splits are computed by one thread. They keep sums short there:
 * rounding errors grow with the number of terms, first the blocks of a split and then the splits. Merges are
 * too rare to show. */
#define MIN_SPLIT_KEYS_OF_LARGE_GROUPS 2048

/* Rows of a split in the backward pass, at least, and splits of a group, at most: where the groups are fewer
 * than the threads need, each takes memory for the gradients of its keys. To add a split to those before
 * reads and writes all of them, which few rows are not worth. */
#define MIN_SPLIT_ROWS 1024
#define MAX_ROW_SPLITS 8
/* Of so few groups a thread, splits are items of their own. */
#define MIN_GROUPS_PER_THREAD 2

/* The backward pass has five products where the forward pass has two. */
#define BACKWARD_WORK 2.5

/* Keys of a split that has them all. */
#define WHOLE_SPLIT_KEYS (INT64_MAX / 2 / FA_KEY_BLOCK * FA_KEY_BLOCK)

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t count_sequences(const fa_problem *p)
{
    int64_t count = 1;
    for (int axis = 0; axis < p->batch_ndim; axis++)
        count *= p->batch_shape[axis];
    return count;
}

static void index_sequence(const fa_problem *p, int64_t sequence, int64_t *batch_index)
{
    for (int axis = p->batch_ndim - 1; axis >= 0; axis--) {
        batch_index[axis] = sequence % p->batch_shape[axis];
        sequence /= p->batch_shape[axis];
    }
}

static int64_t read_integer(const fa_array *array, const fa_problem *p, const int64_t *batch_index)
{
    const char *data = array->data;
    for (int axis = 0; axis < p->batch_ndim; axis++)
        data += batch_index[axis] * array->batch[axis];
    return *(const int64_t *)data;
}

fa_sequence fa_sequence_at(const fa_problem *p, const int64_t *batch_index)
{
    fa_sequence s = {.num_queries = p->seqlen_q, .num_keys = p->seqlen_k};
    if (p->cu_seqlens_q) {
        s.first_query = p->cu_seqlens_q[batch_index[0]];
        s.num_queries = p->cu_seqlens_q[batch_index[0] + 1] - s.first_query;
    }
    if (p->cu_seqlens_k) {
        s.first_key = p->cu_seqlens_k[batch_index[0]];
        s.num_keys = p->cu_seqlens_k[batch_index[0] + 1] - s.first_key;
    }
    if (p->key_lengths.data)
        s.num_keys = read_integer(&p->key_lengths, p, batch_index);
    s.query_offset =
        p->query_offset.data ? read_integer(&p->query_offset, p, batch_index) : s.num_keys - s.num_queries;
    const int64_t first = s.query_offset, last = s.query_offset + s.num_queries - 1;
    s.key_lo = fa_row_interval(p, first, s.num_keys).lo;
    s.key_hi = fa_row_interval(p, last, s.num_keys).hi;
    if (s.key_hi < s.key_lo) /* no query, or none that sees a key */
        s.key_hi = s.key_lo;
    return s;
}

static int64_t rows_per_group(const fa_problem *p, const fa_sequence *s)
{
    return s->num_queries * (p->num_heads / p->num_kv_heads);
}

/* Multiply-adds of all kv heads, and the reads of their keys in the same unit. */
static double work_of(const fa_problem *p, const fa_sequence *s)
{
    double rows = (double)rows_per_group(p, s);
    double row_keys = rows == 0 ? 0 : (rows + ROWS_PER_KEY_READ) * (double)(s->key_hi - s->key_lo);
    const double products = row_keys * (double)p->num_kv_heads * (double)(p->head_dim + p->head_dim_v);
    return p->gradients ? BACKWARD_WORK * products : products;
}

static void split_keys(const fa_sequence *s, int64_t min_keys, fa_group_plan *group_plan)
{
    int64_t keys = s->key_hi - s->key_lo;
    group_plan->split_keys = ceil_div(keys, (int64_t)FA_KEY_BLOCK * MAX_SPLITS) * FA_KEY_BLOCK;
    if (group_plan->split_keys < min_keys)
        group_plan->split_keys = min_keys;
    group_plan->first_split = s->key_lo / group_plan->split_keys;
    group_plan->num_splits =
        keys == 0 ? 1 : ceil_div(s->key_hi, group_plan->split_keys) - group_plan->first_split;
}

static fa_group_plan plan_backward_group(const fa_problem *p, const fa_partition *part, const fa_sequence *s)
{
    const fa_kernel *kernel = fa_select_backward_kernel(p);
    const int64_t rows = rows_per_group(p, s), step = kernel->backward_rows(p);
    fa_group_plan group_plan = {.kernel = kernel,
                                .num_splits = 1,
                                .rows_per_item = 1,
                                .split_keys = WHOLE_SPLIT_KEYS,
                                .split_rows = 1};
    if (rows == 0)
        return group_plan;
    const int64_t least = fa_clamp(ceil_div(rows, MAX_ROW_SPLITS), MIN_SPLIT_ROWS, INT64_MAX);
    const int64_t splits = ceil_div(rows, ceil_div(least, step) * step);
    group_plan.split_rows = ceil_div(ceil_div(rows, splits), kernel->lanes) * kernel->lanes;
    group_plan.num_splits = ceil_div(rows, group_plan.split_rows);
    group_plan.rows_per_item = rows;
    group_plan.num_row_items = 1;
    group_plan.shares_splits =
        group_plan.num_splits > 1 && part->num_threads > 1 &&
        part->num_sequences * p->num_kv_heads < (int64_t)MIN_GROUPS_PER_THREAD * part->num_threads;
    group_plan.partial_bytes = kernel->sum_bytes(p, s->key_lo, s->key_hi);
    return group_plan;
}

static fa_group_plan plan_group(const fa_problem *p, const fa_partition *part, const fa_sequence *s)
{
    if (p->gradients)
        return plan_backward_group(p, part, s);
    const int64_t rows = rows_per_group(p, s);
    fa_group_plan group_plan = {
        .kernel = fa_select_kernel(p, rows, s->key_hi - s->key_lo), .num_splits = 1, .rows_per_item = 1};
    if (rows == 0)
        return group_plan;
    const int64_t lanes = group_plan.kernel->lanes, tile_rows = lanes * group_plan.kernel->max_vectors;
    if (rows <= tile_rows && p->top_count == 0) {
        split_keys(s, MIN_SPLIT_KEYS, &group_plan);
        group_plan.rows_per_item = rows;
        group_plan.num_row_items = 1;
        /* Weights take a second pass, which one thread makes over all keys. */
        group_plan.shares_splits = group_plan.num_splits > 1 && part->num_threads > 1 && !p->weights.data &&
                                   work_of(p, s) > part->work_per_item * (double)p->num_kv_heads;
        group_plan.partial_bytes = group_plan.kernel->partial_bytes(p, rows);
        return group_plan;
    }
    /* Items of whole vectors, as even as they can be. */
    const bool whole = p->top_count > 0 || !group_plan.kernel->splits_many_rows;
    split_keys(s, whole ? WHOLE_SPLIT_KEYS : MIN_SPLIT_KEYS_OF_LARGE_GROUPS, &group_plan);
    const int64_t vectors = ceil_div(rows, lanes);
    const int64_t items = ceil_div(vectors, (int64_t)part->tiles_per_item * group_plan.kernel->max_vectors);
    group_plan.rows_per_item = ceil_div(vectors, items) * lanes;
    group_plan.num_row_items = ceil_div(rows, group_plan.rows_per_item);
    return group_plan;
}

static int64_t items_per_group(const fa_group_plan *group_plan)
{
    return group_plan->shares_splits ? group_plan->num_splits : group_plan->num_row_items;
}

/* A cache line with the count of finished splits, before the partial results of a group. */
#define COUNT_BYTES 64

static size_t partial_bytes_per_group(const fa_group_plan *group_plan)
{
    return group_plan->shares_splits
               ? COUNT_BYTES + (size_t)group_plan->num_splits * group_plan->partial_bytes
               : 0;
}

static bool varies(const fa_array *array, const fa_problem *p)
{
    bool steps = false;
    for (int axis = 0; axis < p->batch_ndim; axis++)
        steps |= array->batch[axis] != 0;
    return array->data && steps;
}

static bool sequences_are_uniform(const fa_problem *p)
{
    return !p->cu_seqlens_q && !p->cu_seqlens_k && !varies(&p->key_lengths, p) &&
           !varies(&p->query_offset, p);
}

static fa_sequence nth_sequence(const fa_problem *p, int64_t n)
{
    int64_t batch_index[FA_MAX_BATCH_DIMS];
    index_sequence(p, n, batch_index);
    return fa_sequence_at(p, batch_index);
}

/* Of uniform sequences, the first stands for all. */
static double total_work(const fa_problem *p, int64_t num_sequences, bool uniform)
{
    double total = 0;
    for (int64_t n = 0; n < (uniform ? 1 : num_sequences); n++) {
        fa_sequence s = nth_sequence(p, n);
        total += work_of(p, &s);
    }
    return uniform ? total * (double)num_sequences : total;
}

static int64_t count_items(const fa_problem *p, const fa_partition *part, bool uniform)
{
    int64_t items = 0;
    for (int64_t n = 0; n < (uniform ? 1 : part->num_sequences); n++) {
        fa_sequence s = nth_sequence(p, n);
        fa_group_plan group_plan = plan_group(p, part, &s);
        items += items_per_group(&group_plan) * p->num_kv_heads;
    }
    return uniform ? items * part->num_sequences : items;
}

static void choose_threads(const fa_problem *p, double work, fa_partition *part)
{
    double useful = work / MULTIPLY_ADDS_PER_THREAD;
    part->num_threads = fa_runnable_threads(useful < p->num_threads ? (int)useful : p->num_threads);
    if (part->num_threads < 1)
        part->num_threads = 1;
    part->work_per_item = work * MIN_WORK_SHARE / (double)part->num_threads;
}

static void choose_tiles_per_item(const fa_problem *p, bool uniform, fa_partition *part)
{
    const int64_t most_rows = p->seqlen_q * (p->num_heads / p->num_kv_heads);
    const fa_kernel *kernel = fa_select_kernel(p, most_rows, p->seqlen_k);
    const int64_t most_tiles = ceil_div(most_rows, (int64_t)kernel->lanes * kernel->max_vectors);
    part->tiles_per_item = (int)fa_clamp(most_tiles, 1, kernel->max_tiles);
    while (part->tiles_per_item > 1 &&
           (kernel->scratch_bytes(p, part->tiles_per_item) > MAX_SCRATCH_BYTES ||
            count_items(p, part, uniform) < (int64_t)kernel->items_per_thread * part->num_threads))
        part->tiles_per_item--;
}

static size_t scratch_bytes_of(const fa_problem *p, const fa_group_plan *group_plan, const fa_sequence *s)
{
    const fa_kernel *kernel = group_plan->kernel;
    if (p->gradients) {
        const int num_sums = group_plan->shares_splits ? 0 : group_plan->num_splits > 1 ? 2 : 1;
        return kernel->backward_scratch_bytes(p, s->key_lo, s->key_hi, num_sums);
    }
    const int64_t tile_rows = (int64_t)kernel->lanes * kernel->max_vectors;
    return kernel->scratch_bytes(p, (int)ceil_div(group_plan->rows_per_item, tile_rows));
}

/* Adds the items and the memory of `times` sequences like this one, with this plan. */
static void add_sequences(const fa_problem *p, const fa_group_plan *group_plan, const fa_sequence *s,
                          int64_t times, fa_partition *part)
{
    if (group_plan->num_row_items == 0)
        return;
    const size_t scratch = scratch_bytes_of(p, group_plan, s);
    part->num_items += times * p->num_kv_heads * items_per_group(group_plan);
    part->shared_bytes += (size_t)(times * p->num_kv_heads) * partial_bytes_per_group(group_plan);
    part->scratch_bytes = scratch > part->scratch_bytes ? scratch : part->scratch_bytes;
    part->max_splits = group_plan->num_splits > part->max_splits ? group_plan->num_splits : part->max_splits;
}

bool fa_partition_problem(const fa_problem *p, fa_partition *part)
{
    *part = (fa_partition){.num_sequences = count_sequences(p), .tiles_per_item = 1, .num_threads = 1};
    if (p->num_heads == 0 || p->seqlen_q == 0 || p->num_kv_heads == 0 || part->num_sequences == 0)
        return true;
    const bool uniform = sequences_are_uniform(p);
    choose_threads(p, total_work(p, part->num_sequences, uniform), part);
    if (!p->gradients)
        choose_tiles_per_item(p, uniform, part);
    if (uniform) {
        part->sequence = nth_sequence(p, 0);
        part->group_plan = plan_group(p, part, &part->sequence);
        add_sequences(p, &part->group_plan, &part->sequence, part->num_sequences, part);
    } else {
        part->prefixes = malloc(((size_t)part->num_sequences + 1) * sizeof *part->prefixes);
        if (!part->prefixes)
            return false;
        for (int64_t n = 0; n < part->num_sequences; n++) {
            part->prefixes[n] = (fa_prefix){part->num_items, part->shared_bytes};
            fa_sequence s = nth_sequence(p, n);
            fa_group_plan group_plan = plan_group(p, part, &s);
            add_sequences(p, &group_plan, &s, 1, part);
        }
        part->prefixes[part->num_sequences] = (fa_prefix){part->num_items, part->shared_bytes};
    }
    if (part->num_threads > part->num_items)
        part->num_threads = part->num_items > 0 ? (int)part->num_items : 1;
    return true;
}

void fa_free_partition(fa_partition *part)
{
    free(part->prefixes);
}

/* The sequence that an item belongs to. */
static int64_t find_sequence(const fa_partition *part, int64_t item)
{
    int64_t lo = 0, hi = part->num_sequences;
    while (hi - lo > 1) {
        int64_t middle = lo + (hi - lo) / 2;
        if (part->prefixes[middle].items <= item)
            lo = middle;
        else
            hi = middle;
    }
    return lo;
}

static fa_prefix prefix_of(const fa_partition *part, int64_t sequence)
{
    if (part->prefixes)
        return part->prefixes[sequence];
    return (fa_prefix){sequence * (part->num_items / part->num_sequences),
                       (size_t)sequence * (part->shared_bytes / (size_t)part->num_sequences)};
}

/* Items of a group follow each other, so that a thread finds its keys in cache. Later rows come first: under
 * a causal mask they see more keys, and the last items should be short. */
const fa_kernel *fa_item_at(const fa_problem *p, const fa_partition *part, int64_t index, char *shared,
                            fa_work_item *item)
{
    int64_t sequence =
        part->prefixes ? find_sequence(part, index) : index / (part->num_items / part->num_sequences);
    const fa_prefix prefix = prefix_of(part, sequence);
    index_sequence(p, sequence, item->batch_index);
    item->sequence = part->prefixes ? fa_sequence_at(p, item->batch_index) : part->sequence;

    const fa_group_plan group_plan = part->prefixes ? plan_group(p, part, &item->sequence) : part->group_plan;
    const int64_t per_group = items_per_group(&group_plan);
    item->kv_head = (index - prefix.items) / per_group;
    int64_t in_group = (index - prefix.items) % per_group;

    item->split_keys = group_plan.split_keys;
    item->split_rows = group_plan.split_rows;
    item->first_split = item->split_begin = group_plan.first_split;
    item->num_splits = group_plan.num_splits;
    item->split_end = group_plan.first_split + group_plan.num_splits;
    item->partials = NULL;
    item->splits_done = NULL;
    int64_t row_item = group_plan.num_row_items - 1 - in_group;
    if (group_plan.shares_splits) {
        char *partials =
            shared + prefix.partial_bytes + (size_t)item->kv_head * partial_bytes_per_group(&group_plan);
        item->splits_done = (_Atomic int64_t *)partials;
        item->partials = partials + COUNT_BYTES;
        item->split_begin = group_plan.first_split + in_group;
        item->split_end = item->split_begin + 1;
        row_item = 0;
    }
    const int64_t rows = rows_per_group(p, &item->sequence);
    item->row_begin = row_item * group_plan.rows_per_item;
    item->row_end =
        item->row_begin + group_plan.rows_per_item < rows ? item->row_begin + group_plan.rows_per_item : rows;
    return group_plan.kernel;
}

bool fa_same_geometry(const fa_work_item *a, const fa_work_item *b)
{
    const fa_sequence *s = &a->sequence, *t = &b->sequence;
    return a->row_begin == b->row_begin && a->row_end == b->row_end && s->num_queries == t->num_queries &&
           s->num_keys == t->num_keys && s->query_offset == t->query_offset &&
           a->split_keys == b->split_keys && a->split_begin == b->split_begin && a->split_end == b->split_end;
}

static const fa_kernel *select_kernel(const fa_problem *p, int64_t rows, int64_t keys)
{
    return p->gradients ? fa_select_backward_kernel(p) : fa_select_kernel(p, rows, keys);
}

fa_status fa_plan_problem(const fa_problem *p, fa_plan *plan)
{
    fa_partition part;
    if (!fa_partition_problem(p, &part))
        return FA_NO_MEMORY;
    const int64_t group_rows = p->num_kv_heads > 0 ? p->seqlen_q * (p->num_heads / p->num_kv_heads) : 0;
    const fa_kernel *kernel =
        part.group_plan.kernel ? part.group_plan.kernel : select_kernel(p, group_rows, p->seqlen_k);
    const bool is_decode = fa_is_decode(p, group_rows, kernel->decode_rows);
    *plan = (fa_plan){
        .isa = kernel->isa,
        .kernel = kernel->name,
        .is_decode = is_decode,
        .tile_rows = kernel->lanes * kernel->max_vectors,
        .key_block = is_decode ? FA_DECODE_KEYS : FA_KEY_BLOCK,
        .tiles_per_item = part.tiles_per_item,
        .num_splits = part.max_splits,
        .num_items = part.num_items,
        .num_threads = part.num_threads,
        .scratch_bytes = part.scratch_bytes,
        .shared_bytes = part.shared_bytes,
    };
    fa_free_partition(&part);
    return FA_OK;
}

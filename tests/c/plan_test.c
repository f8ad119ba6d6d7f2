/* Checks the work partition: over many shapes, windows, lengths, offsets and splits, the items compute each
 * (query row, key) that a row sees exactly once, their partial results lie apart, and their scratch is large
 * enough. The kernels are made up here: the plan knows them by their table entries alone. */
#include <stdatomic.h>
#include <string.h>

#include "check.h"
#include "cpu.h"
#include "dispatch.h"
#include "plan.h"

enum { MAX_SEQUENCES = 12, NUM_PROBLEMS = 8000 };

static size_t scratch_bytes(const fa_problem *p, int tiles)
{
    return (size_t)tiles * (size_t)(p->head_dim + p->head_dim_v) * 1000;
}

static size_t partial_bytes(const fa_problem *p, int64_t rows)
{
    return ((size_t)rows * (size_t)p->head_dim_v * sizeof(float) + 63) / 64 * 64;
}

static int64_t backward_rows(const fa_problem *p)
{
    return p->head_dim % 7 * 16 + 16;
}

static size_t sum_bytes(const fa_problem *p, int64_t key_lo, int64_t key_hi)
{
    return (size_t)((key_hi - key_lo) * p->head_dim + 63) / 64 * 64;
}

static size_t backward_scratch_bytes(const fa_problem *p, int64_t key_lo, int64_t key_hi, int num_sums)
{
    return 1000 + (size_t)num_sums * sum_bytes(p, key_lo, key_hi);
}

static fa_kernel kernel = {
    .isa = "none",
    .name = "none",
    .scratch_bytes = scratch_bytes,
    .partial_bytes = partial_bytes,
    .backward_rows = backward_rows,
    .backward_scratch_bytes = backward_scratch_bytes,
    .sum_bytes = sum_bytes,
};

const fa_kernel *fa_select_kernel(const fa_problem *problem, int64_t rows, int64_t keys)
{
    (void)problem, (void)rows, (void)keys;
    return &kernel;
}

const fa_kernel *fa_select_backward_kernel(const fa_problem *problem)
{
    (void)problem;
    return &kernel;
}

/* --- problems ------------------------------------------------------------------------------------- */

typedef struct {
    fa_problem problem;
    int64_t num_sequences;
    int64_t key_lengths[MAX_SEQUENCES], query_offsets[MAX_SEQUENCES];
    int64_t cu_seqlens_q[MAX_SEQUENCES + 1], cu_seqlens_k[MAX_SEQUENCES + 1];
} test_case;

static bool one_in(int n)
{
    return random_int(1, n) == 1;
}

/* Small numbers mostly, so that many cases are cheap, and now and then a large one. */
static int64_t random_length(int64_t most)
{
    const int64_t limits[] = {1, 3, 17, 64, 200, most};
    const int64_t limit = limits[random_int(0, 5)];
    return random_int(0, limit < most ? limit : most);
}

/* Contiguous in the order of the batch axes, or the same for all. */
static void point_at(fa_array *array, int64_t *data, const fa_problem *p)
{
    array->data = (char *)data;
    ptrdiff_t stride = sizeof *data;
    for (int axis = p->batch_ndim - 1; axis >= 0; axis--) {
        array->batch[axis] = stride;
        stride *= p->batch_shape[axis];
    }
    if (one_in(3))
        memset(array->batch, 0, sizeof array->batch);
}

static void make_packed(test_case *c)
{
    fa_problem *p = &c->problem;
    p->batch_ndim = 1;
    p->batch_shape[0] = c->num_sequences = random_int(0, MAX_SEQUENCES);
    const int64_t most_queries = p->seqlen_q, most_keys = p->seqlen_k;
    p->seqlen_q = p->seqlen_k = 0; /* of a sequence, at most */
    for (int64_t b = 0; b < c->num_sequences; b++) {
        const int64_t queries = random_length(most_queries), keys = random_length(most_keys);
        c->cu_seqlens_q[b + 1] = c->cu_seqlens_q[b] + queries;
        c->cu_seqlens_k[b + 1] = c->cu_seqlens_k[b] + keys;
        p->seqlen_q = queries > p->seqlen_q ? queries : p->seqlen_q;
        p->seqlen_k = keys > p->seqlen_k ? keys : p->seqlen_k;
    }
    p->cu_seqlens_q = c->cu_seqlens_q;
    p->cu_seqlens_k = c->cu_seqlens_k;
}

static void make_batched(test_case *c)
{
    fa_problem *p = &c->problem;
    p->batch_ndim = (int)random_int(0, 2);
    c->num_sequences = 1;
    for (int axis = 0; axis < p->batch_ndim; axis++)
        c->num_sequences *= p->batch_shape[axis] = random_int(one_in(20) ? 0 : 1, 3);
    for (int b = 0; b < MAX_SEQUENCES; b++) {
        c->key_lengths[b] = random_int(0, p->seqlen_k);
        c->query_offsets[b] = random_int(-20, p->seqlen_k + 20);
    }
    if (one_in(3))
        point_at(&p->key_lengths, c->key_lengths, p);
    if (one_in(3))
        point_at(&p->query_offset, c->query_offsets, p);
}

static void make_case(test_case *c)
{
    fa_problem *p = &c->problem;
    memset(c, 0, sizeof *c);
    kernel.lanes = 1 << random_int(1, 4);
    kernel.max_vectors = (int)random_int(1, 3);
    kernel.max_tiles = (int)random_int(1, 16);
    kernel.items_per_thread = (int)random_int(1, 24);
    kernel.splits_many_rows = one_in(2);
    kernel.decode_rows = kernel.lanes / 2;
    p->num_kv_heads = random_int(one_in(50) ? 0 : 1, 3);
    p->num_heads = p->num_kv_heads * random_int(1, 4);
    p->head_dim = random_int(1, 128);
    p->head_dim_v = random_int(1, 512);
    p->seqlen_k = random_length(6000);
    p->seqlen_q = random_length(p->seqlen_k > 1000 ? 40 : 300);
    p->left = one_in(2) ? FA_UNBOUNDED : random_length(4000);
    p->right = one_in(3) ? FA_UNBOUNDED : one_in(2) ? 0 : random_length(100);
    p->top_count = one_in(8) ? 5 : 0;
    p->num_threads = (int)random_int(1, 16);
    static char weights;
    p->weights.data = one_in(8) ? &weights : NULL;
    static const fa_gradients gradients;
    p->gradients = one_in(3) ? &gradients : NULL;
    if (p->gradients && p->seqlen_k < 300 && one_in(2)) /* enough rows for splits of them */
        p->seqlen_q = random_int(300, 3000);
    if (one_in(3))
        make_packed(c);
    else
        make_batched(c);
}

/* --- what each sequence is, told apart from the plan ----------------------------------------------- */

static int64_t integer_of(const fa_array *array, const fa_problem *p, int64_t sequence)
{
    const char *data = array->data;
    for (int axis = p->batch_ndim - 1; axis >= 0; axis--) {
        data += sequence % p->batch_shape[axis] * array->batch[axis];
        sequence /= p->batch_shape[axis];
    }
    return *(const int64_t *)data;
}

static fa_sequence expected_sequence(const test_case *c, int64_t b)
{
    const fa_problem *p = &c->problem;
    fa_sequence s = {.num_queries = p->seqlen_q, .num_keys = p->seqlen_k};
    if (p->cu_seqlens_q) {
        s.num_queries = c->cu_seqlens_q[b + 1] - c->cu_seqlens_q[b];
        s.first_query = c->cu_seqlens_q[b];
        s.num_keys = c->cu_seqlens_k[b + 1] - c->cu_seqlens_k[b];
        s.first_key = c->cu_seqlens_k[b];
    }
    if (p->key_lengths.data)
        s.num_keys = integer_of(&p->key_lengths, p, b);
    s.query_offset = p->query_offset.data ? integer_of(&p->query_offset, p, b) : s.num_keys - s.num_queries;
    return s;
}

static bool sees(const fa_problem *p, int64_t position, int64_t key)
{
    return (p->left == FA_UNBOUNDED || key >= position - p->left) &&
           (p->right == FA_UNBOUNDED || key <= position + p->right);
}

/* --- items ---------------------------------------------------------------------------------------- */

/* How often each (row, key) of one group is computed, and whose partial results are where. */
typedef struct {
    unsigned char *counts; /* [row][key] */
    int64_t num_rows, num_keys;
    fa_work_item first; /* of the group */
    int num_items;
} group_record;

static int64_t sequence_index(const fa_problem *p, const int64_t *batch_index)
{
    int64_t index = 0;
    for (int axis = 0; axis < p->batch_ndim; axis++) {
        REQUIRE(batch_index[axis] >= 0 && batch_index[axis] < p->batch_shape[axis]);
        index = index * p->batch_shape[axis] + batch_index[axis];
    }
    return index;
}

static void check_sequence(const test_case *c, const fa_work_item *item, int64_t b)
{
    const fa_sequence want = expected_sequence(c, b), got = item->sequence;
    REQUIRE(got.num_queries == want.num_queries && got.num_keys == want.num_keys);
    REQUIRE(got.first_query == want.first_query && got.first_key == want.first_key);
    REQUIRE(got.query_offset == want.query_offset);
    REQUIRE(got.key_lo >= 0 && got.key_lo <= got.key_hi && got.key_hi <= got.num_keys);
}

static void check_geometry(const fa_problem *p, const fa_partition *part, const fa_work_item *item)
{
    const int64_t rows = item->row_end - item->row_begin, tile_rows = kernel.lanes * kernel.max_vectors;
    REQUIRE(item->split_keys > 0 && item->split_keys % FA_KEY_BLOCK == 0);
    REQUIRE(item->row_begin >= 0 && rows > 0);
    REQUIRE(item->split_begin >= item->first_split && item->split_begin < item->split_end);
    REQUIRE(item->split_end <= item->first_split + item->num_splits);
    const fa_sequence *s = &item->sequence;
    const int num_sums = item->partials ? 0 : item->num_splits > 1 ? 2 : 1;
    const size_t bytes = p->gradients ? backward_scratch_bytes(p, s->key_lo, s->key_hi, num_sums)
                                      : scratch_bytes(p, (int)((rows + tile_rows - 1) / tile_rows));
    REQUIRE(bytes <= part->scratch_bytes);
    if (p->gradients)
        REQUIRE(item->split_rows > 0 && item->split_rows % kernel.lanes == 0);
}

static size_t partials_bytes(const fa_problem *p, const fa_work_item *item)
{
    const fa_sequence *s = &item->sequence;
    return (size_t)item->num_splits * (p->gradients ? sum_bytes(p, s->key_lo, s->key_hi)
                                                    : partial_bytes(p, item->row_end - item->row_begin));
}

/* Splits that are merged by the item that finishes last: each has a place of its own, and the group a count.
 */
static void check_partials(const fa_problem *p, const fa_partition *part, const char *shared,
                           const fa_work_item *item, const group_record *group)
{
    if (!item->partials) {
        REQUIRE(item->split_begin == item->first_split);
        REQUIRE(item->split_end == item->first_split + item->num_splits);
        return;
    }
    const size_t bytes = partials_bytes(p, item);
    REQUIRE(item->partials >= shared && item->partials + bytes <= shared + part->shared_bytes);
    REQUIRE((uintptr_t)item->partials % 64 == (uintptr_t)shared % 64);
    REQUIRE((const char *)item->splits_done >= shared &&
            (const char *)(item->splits_done + 1) <= item->partials);
    REQUIRE(item->split_end == item->split_begin + 1);
    if (group->num_items > 0)
        REQUIRE(item->partials == group->first.partials && item->splits_done == group->first.splits_done);
}

/* Groups with partial results mark their bytes, which nobody else may have marked. */
static void claim_partials(const fa_problem *p, const fa_work_item *item, const char *shared, char *owned)
{
    const char *end = item->partials + partials_bytes(p, item);
    for (const char *at = (const char *)item->splits_done; at < end; at++) {
        REQUIRE(!owned[at - shared]);
        owned[at - shared] = 1;
    }
}

static void count_keys(const fa_problem *p, const fa_work_item *item, group_record *group)
{
    const int64_t group_size = p->num_heads / p->num_kv_heads;
    for (int64_t row = item->row_begin; row < item->row_end; row++) {
        if (p->gradients &&
            (row / item->split_rows < item->split_begin || row / item->split_rows >= item->split_end))
            continue;
        const int64_t position = row / group_size + item->sequence.query_offset;
        const fa_interval keys = fa_row_interval(p, position, item->sequence.num_keys);
        const int64_t begin = p->gradients ? 0 : item->split_begin * item->split_keys;
        for (int64_t n = keys.lo > begin ? keys.lo : begin;
             n < keys.hi && (p->gradients || n / item->split_keys < item->split_end); n++)
            group->counts[row * group->num_keys + n]++;
    }
}

static void check_counts(const fa_problem *p, const fa_sequence *s, const group_record *group)
{
    const int64_t group_size = p->num_heads / p->num_kv_heads;
    for (int64_t row = 0; row < group->num_rows; row++)
        for (int64_t n = 0; n < group->num_keys; n++) {
            const int expected = sees(p, row / group_size + s->query_offset, n);
            const int count = group->counts[row * group->num_keys + n];
            REQUIRE(count == expected, "row %d, key %d: %d times", (int)row, (int)n, count);
        }
}

static void begin_groups(const test_case *c, group_record *groups)
{
    for (int64_t b = 0; b < c->num_sequences; b++) {
        const fa_sequence s = expected_sequence(c, b);
        for (int64_t head = 0; head < c->problem.num_kv_heads; head++) {
            group_record *group = &groups[b * c->problem.num_kv_heads + head];
            group->num_rows = s.num_queries * (c->problem.num_heads / c->problem.num_kv_heads);
            group->num_keys = s.num_keys;
            group->counts = calloc((size_t)(group->num_rows * group->num_keys) + 1, 1);
            REQUIRE(group->counts);
        }
    }
}

static void end_groups(const test_case *c, group_record *groups)
{
    for (int64_t b = 0; b < c->num_sequences; b++) {
        const fa_sequence s = expected_sequence(c, b);
        for (int64_t head = 0; head < c->problem.num_kv_heads; head++) {
            group_record *group = &groups[b * c->problem.num_kv_heads + head];
            REQUIRE((group->num_items > 0) == (group->num_rows > 0), "rows without keys are computed, too");
            check_counts(&c->problem, &s, group);
            free(group->counts);
        }
    }
}

static void check_items(const test_case *c, const fa_partition *part, group_record *groups)
{
    const fa_problem *p = &c->problem;
    char *shared = calloc(part->shared_bytes + 1, 1), *owned = calloc(part->shared_bytes + 1, 1);
    REQUIRE(shared && owned);
    for (int64_t index = 0; index < part->num_items; index++) {
        fa_work_item item;
        REQUIRE(fa_item_at(p, part, index, shared, &item) == &kernel);
        const int64_t b = sequence_index(p, item.batch_index);
        REQUIRE(item.kv_head >= 0 && item.kv_head < p->num_kv_heads);
        group_record *group = &groups[b * p->num_kv_heads + item.kv_head];
        REQUIRE(item.row_end <= group->num_rows);
        check_sequence(c, &item, b);
        check_geometry(p, part, &item);
        check_partials(p, part, shared, &item, group);
        if (item.partials && group->num_items == 0)
            claim_partials(p, &item, shared, owned);
        count_keys(p, &item, group);
        if (group->num_items++ == 0)
            group->first = item;
    }
    free(shared);
    free(owned);
}

/* What kind of work a partition has, so that no kind is missed by chance. */
static int num_shared, num_split, num_uniform, num_ragged, num_shared_rows;

static void check_case(const test_case *c)
{
    static group_record groups[MAX_SEQUENCES * 3];
    memset(groups, 0, sizeof groups);
    fa_partition part;
    REQUIRE(fa_partition_problem(&c->problem, &part));
    REQUIRE(part.num_threads >= 1 && part.num_threads <= c->problem.num_threads);
    begin_groups(c, groups);
    check_items(c, &part, groups);
    end_groups(c, groups);
    num_shared += !c->problem.gradients && part.shared_bytes > 0;
    num_shared_rows += c->problem.gradients && part.shared_bytes > 0;
    num_split += part.max_splits > 1;
    num_ragged += part.prefixes != NULL;
    num_uniform += part.prefixes == NULL && part.num_items > 0;
    fa_free_partition(&part);
}

int main(void)
{
    fa_assume_cpus(16);
    static test_case c;
    for (int i = 0; i < NUM_PROBLEMS; i++) {
        make_case(&c);
        check_case(&c);
    }
    REQUIRE(num_shared > 50 && num_split > 50 && num_uniform > 50 && num_ragged > 50 && num_shared_rows > 50,
            "%d %d %d %d %d", num_shared, num_split, num_uniform, num_ragged, num_shared_rows);
    return 0;
}

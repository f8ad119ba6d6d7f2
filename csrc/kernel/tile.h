/* A tile: query rows as lanes, with what each lane may see and its running softmax; and the scratch
 * of a work item, which is some tiles that share key blocks.
 *
 * Requires an operand and a product; provides tile, key_range, workspace and lay_out. */
#include "for_editors.h"

#ifndef FA_KERNEL_TILE_H
#define FA_KERNEL_TILE_H

#include "../kernel.h"
#include "product.h"

#define TILE_ROWS (MAX_VECTORS * LANES)

/* A tile of so few rows is decode: its one vector holds some keys' scores for all rows, key by key. */
#ifndef DECODE_ROWS
#define DECODE_ROWS (LANES / 2)
#endif

/* Whether the tile unit multiplies them. */
#ifndef DECODES_IN_TILES
#define DECODES_IN_TILES 0
#endif

/* Keys between two updates of the running softmax. Scores of a full tile: 64 × 3 vectors = 12 KiB of
 * AVX-512 floats, which leaves L1 room for the queries of head_dim 64 and the rows of K and V. */
#define KEY_BLOCK FA_KEY_BLOCK
#define MASK_WORDS (KEY_BLOCK / LANE_BITS)

/* In a decode tile: four blocks, if they are masked, packed or lie in small pages, or one of that size. */
#define DECODE_KEYS FA_DECODE_KEYS
#define DECODE_BLOCKS (DECODE_KEYS / KEY_BLOCK)

/* The running softmax of a tile over some of its keys. */
typedef struct {
    vec row_max[MAX_VECTORS], row_sum[MAX_VECTORS], exact_sum[MAX_VECTORS];
    vec out[];
} partial;

typedef struct {
    vec row_max[MAX_VECTORS]; /* reference of the exponentials, in units of the scores; see softmax.h */
    vec row_sum[MAX_VECTORS];
    vec exact_sum[MAX_VECTORS]; /* for lse: of exponentials to the precision of `real`, where row_sum is of
                                   coarse ones */
    vec share_before[MAX_VECTORS], share[MAX_VECTORS]; /* of the results that are there, or -1 where there are
                                                          none, and of these; where a problem adds */
    vec slope[MAX_VECTORS];
    uvec drop_position[MAX_VECTORS], drop_head[MAX_VECTORS]; /* 32 bits of each; with dropout */
    uint32_t drop_item;
    ivec mask_words[MASK_WORDS][MAX_VECTORS]; /* this block's keys that a row's mask lets it see, as bits */
    int64_t row_begin;
    int rows;                 /* in use; the lanes beyond repeat the last row, and are not stored */
    int vectors;              /* of LANES rows */
    int rows_pow2;            /* 0, or in a decode tile `rows`, rounded up to a power of two */
    int key_shift;            /* 2^key_shift keys in a row of the score panel: LANES / rows_pow2, or 1 */
    bool packed;              /* `query` is there */
    bool rises;               /* scores have exceeded row_max by far; of the pipeline */
    bool folded;              /* folded_out and folded_sum are there; of the pipeline */
    bool empty;               /* no key block yet: `out` is not there, and stands for 0 */
    int64_t key_lo, key_hi;   /* keys that some row sees lie in [key_lo, key_hi) */
    int64_t full_lo, full_hi; /* keys that no row's interval hides: [full_lo, full_hi) */
    int64_t lo[TILE_ROWS], hi[TILE_ROWS]; /* keys row m's interval lets it see: [lo[m], hi[m]) */
    int64_t position[TILE_ROWS];
    int64_t head[TILE_ROWS], row[TILE_ROWS];
    int lane_key[TILE_ROWS]; /* the lane's key, from the first in its row of the panel on */
    char *query_row[TILE_ROWS], *out_row[TILE_ROWS];
    char *mask[TILE_ROWS], *bias[TILE_ROWS]; /* of key 0 */
    real *top_scores; /* [TILE_ROWS][top_count], as for attention with top_keys; see top.h */
    int64_t *top_keys;
    int top_size[TILE_ROWS];
    vec top_least[MAX_VECTORS]; /* of each lane's row: what a score must exceed to be listed */
    packed_vec *query;          /* [query_panel_rows][vectors]; decode: [head_dim / LANES][row] of reals */
    vec *out;                   /* unnormalised: [head_dim_v][vectors]; decode: [row][head_dim_v / LANES] */
    vec *folded_out;            /* of superblocks before, which `out` is without, as row_sum is */
    vec folded_sum[MAX_VECTORS];
    partial *total; /* where keys are split: over the splits so far */
} tile;

FA_INLINE bool is_decode(const tile *t)
{
    return DECODE_ROWS > 0 && t->rows_pow2 > 0;
}

/* The tile's row that a lane works for; rows that are not in use are >= t->rows. */
FA_INLINE int row_of_lane(const tile *t, int j)
{
    return is_decode(t) ? j % t->rows_pow2 : j;
}

/* Rows in use of a tile's vector m. */
FA_INLINE int rows_of_vector(const tile *t, int m)
{
    return t->rows - m * LANES < LANES ? t->rows - m * LANES : LANES;
}

/* Vectors of t->out. */
FA_INLINE int64_t out_vectors(const tile *t, int64_t head_dim_v)
{
    return is_decode(t) ? t->rows_pow2 * vectors_of(head_dim_v) : head_dim_v * t->vectors;
}

/* A block of K or V as operands: row r (a key, or TILE_K of them for V) starts at
 * data + (r - first) * row. A decode tile takes it in any dtype, with the scales of int8 (NULL: none) apart.
 */
typedef struct {
    const char *data;
    int64_t first;
    ptrdiff_t row, col;
    fa_dtype dtype;
    const char *scale;
    ptrdiff_t scale_step;
} operand_block;

/* Keys [first, last) of the panel, whole rows of it, of which [key_lo, key_hi) may be read. */
typedef struct {
    int64_t first, last;
    int64_t key_lo, key_hi;
} key_range;

FA_INLINE int num_keys(const key_range *range)
{
    return (int)(range->last - range->first);
}

/* Rows of the panel, of 2^key_shift keys each; known to be 1 in the copies for wide tiles. */
FA_INLINE int panel_rows(const tile *t, const key_range *range, bool decode)
{
    return decode ? num_keys(range) >> t->key_shift : num_keys(range);
}

/* The keys of the panel, from range->first on. */
FA_INLINE product_rows key_rows(const key_range *range, const operand_block *key)
{
    return (product_rows){key->data + (range->first - key->first) * key->row, key->row, key->col,
                          (int)(range->key_lo - range->first), (int)(range->key_hi - range->first)};
}

/* What is needed behind a block: the next block's rows, or the next item's first; the queries of the next
 * tile that is packed; and behind a tile's last block, its results. */
typedef struct {
    row_stream key, value, key_scale, value_scale;
    row_stream query, out;
    const row_stream *streams; /* of a decode tile: what it reads in turn, its keys first */
} next_streams;

/* Nothing is needed. Of a stream without rows only the count is read: to clear all would take short sequences
 * a twentieth of their time. */
FA_INLINE void clear_streams(next_streams *next)
{
    next->key.count = next->value.count = 0;
    next->key_scale.count = next->value_scale.count = 0;
    next->query.count = next->out.count = 0;
}

typedef struct {
    tile *tiles;
    vec *scores; /* [KEY_BLOCK][vectors]; becomes the probabilities. Decode: DECODE_KEYS keys of `rows_pow2`
                  * rows each */
    vec *scores_again, *leading_scores, *nowhere; /* of the pipeline */
    packed_vec *probabilities;
    char *packed_key, *packed_value;
    char *finite_values; /* a packed block of the pipeline */
    char *gathered;      /* rows of one block of scattered keys, and then of values */
    partial *split;      /* of a tile, over the last split */
} workspace;

FA_INLINE void *take(char *base, size_t *offset, size_t bytes)
{
    size_t start = *offset;
    *offset = start + (bytes + 63) / 64 * 64;
    return base ? base + start : NULL;
}

FA_INLINE size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t query_bytes(const fa_problem *p)
{
    size_t wide = (size_t)query_panel_rows(p->head_dim) * MAX_VECTORS * sizeof(vec);
    return larger(wide, (size_t)(DECODE_ROWS * vectors_of(p->head_dim)) * sizeof(vec));
}

/* Of a tile that holds up to `rows` rows, which are a decode tile's if these are all of a head group. */
static size_t out_bytes(const fa_problem *p, int64_t rows)
{
    size_t decode = (size_t)(DECODE_ROWS * vectors_of(p->head_dim_v)) * sizeof(vec);
    if (fa_is_decode(p, rows, DECODE_ROWS))
        return decode;
    /* The last micro-tile stores whole. */
    return larger(decode, ((size_t)p->head_dim_v + MAX_SPARE_ROWS) * MAX_VECTORS * sizeof(vec));
}

static size_t partial_bytes(const fa_problem *p, int64_t rows)
{
    return (sizeof(partial) + out_bytes(p, rows) + 63) / 64 * 64;
}

static size_t gathered_bytes(const fa_problem *p)
{
    size_t key = is_scattered(&p->key) ? (size_t)p->head_dim * (size_t)element_size(p->key.dtype) : 0;
    size_t value = is_scattered(&p->value) ? (size_t)p->head_dim_v * (size_t)element_size(p->value.dtype) : 0;
    return KEY_BLOCK * larger(key, value);
}

/* Lays out the scratch of an item of `num_tiles` tiles at `base`; with NULL, only sizes it. */
static size_t lay_out(const fa_problem *p, int num_tiles, char *base, workspace *w)
{
    const size_t vector_row = MAX_VECTORS * sizeof(vec);
    size_t offset = 0;
    w->tiles = take(base, &offset, (size_t)num_tiles * sizeof(tile));
    for (int t = 0; t < num_tiles; t++) {
        void *query = take(base, &offset, query_bytes(p));
        void *out = take(base, &offset, out_bytes(p, TILE_ROWS));
        void *folded_out = take(base, &offset, MAX_PARTS > 1 ? out_bytes(p, TILE_ROWS) : 0);
        const bool is_split = t == 0 || SPLITS_MANY_ROWS;
        void *total = take(base, &offset, is_split ? partial_bytes(p, TILE_ROWS) : 0);
        void *top_keys = take(base, &offset, (size_t)p->top_count * TILE_ROWS * sizeof(int64_t));
        void *top_scores = take(base, &offset, (size_t)p->top_count * TILE_ROWS * sizeof(real));
        if (base) {
            w->tiles[t].query = query;
            w->tiles[t].out = out;
            w->tiles[t].folded_out = folded_out;
            w->tiles[t].total = total;
            w->tiles[t].top_keys = top_keys;
            w->tiles[t].top_scores = top_scores;
        }
    }
    w->scores =
        take(base, &offset,
             larger((KEY_BLOCK + MAX_SPARE_ROWS) * vector_row, DECODE_KEYS * DECODE_ROWS * sizeof(real)));
    if (IS_PIPELINED) {
        const size_t panel_bytes = KEY_BLOCK * vector_row;
        w->scores_again = take(base, &offset, panel_bytes);
        w->leading_scores = take(base, &offset, MAX_PARTS > 1 ? panel_bytes : 0);
        w->probabilities = take(base, &offset, PROBABILITY_PANELS * MAX_PARTS * panel_bytes / 2);
        w->nowhere = take(base, &offset, panel_bytes / 4);
        w->finite_values =
            take(base, &offset, (size_t)(KEY_BLOCK / TILE_K * packed_value_bytes(p->head_dim_v)));
    }
    bool packs_key =
        KEY_STEP > 1 || !key_is_operand(&p->key, p->head_dim) || !is_vector_aligned(&p->key, p->head_dim);
    bool packs_value = !value_is_operand(&p->value) || !is_vector_aligned(&p->value, p->head_dim_v);
    /* Of a decode tile, both are rows. */
    const size_t key_bytes =
        larger((size_t)(KEY_BLOCK * packed_decode_row_bytes(p->head_dim)), wide_key_bytes(p));
    const size_t value_bytes =
        larger((size_t)(KEY_BLOCK * packed_decode_row_bytes(p->head_dim_v)), wide_value_bytes(p));
    w->packed_key = take(base, &offset, packs_key ? key_bytes : 0);
    w->packed_value = take(base, &offset, packs_value ? value_bytes : 0);
    w->gathered = take(base, &offset, packs_key || packs_value ? gathered_bytes(p) : 0);
    w->split = take(base, &offset, partial_bytes(p, TILE_ROWS));
    return offset;
}

/* Offset of a batch item in an array, by the item's index along each batch axis. */
FA_INLINE ptrdiff_t batch_offset(const fa_array *array, const fa_problem *p, const int64_t *index)
{
    ptrdiff_t offset = 0;
    for (int axis = 0; axis < p->batch_ndim; axis++)
        offset += index[axis] * array->batch[axis];
    return offset;
}

/* Each lane's largest score of a panel; NaN is passed over. */
FA_INLINE void find_block_max(const vec *scores, int panel_rows, int vectors, vec block_max[MAX_VECTORS])
{
    for (int m = 0; m < vectors; m++)
        block_max[m] = vec_splat(-(real)INFINITY);
    for (int r = 0; r < panel_rows; r++)
#pragma GCC unroll 3
        for (int m = 0; m < vectors; m++)
            block_max[m] = vec_max(scores[r * vectors + m], block_max[m]);
}

#endif

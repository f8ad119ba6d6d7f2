/* A tile: query rows as lanes, with what each lane may see and its running softmax; and the scratch
 * of a work item, which is some tiles that share key blocks. */
#ifndef FA_KERNEL_TILE_H
#define FA_KERNEL_TILE_H

#include "../dispatch.h"
#include "product.h"

#define TILE_ROWS (MAX_VECTORS * LANES)

/* Keys between two updates of the running softmax. Scores of a full tile: 64 × 3 vectors = 12 KiB of
 * AVX-512 floats, which leaves L1 room for the queries of head_dim 64 and the rows of K and V. */
#define KEY_BLOCK 64
#define MASK_WORDS (KEY_BLOCK / LANE_BITS)

typedef struct {
    vec row_max[MAX_VECTORS]; /* reference of the exponentials, in units of the scores; see softmax.h */
    vec row_sum[MAX_VECTORS];
    vec slope[MAX_VECTORS];
    ivec mask_words[MASK_WORDS][MAX_VECTORS]; /* this block's keys that a row's mask lets it see, as bits */
    int64_t row_begin;
    int rows;                   /* in use; the lanes beyond repeat the last row, and are not stored */
    int vectors;                /* of LANES rows */
    bool packed;                /* `query` is there */
    bool fresh;                 /* no key block yet: `out` is not there, and stands for 0 */
    int64_t key_lo, key_hi;     /* keys that some row sees lie in [key_lo, key_hi) */
    int64_t inner_lo, inner_hi; /* keys that no row's interval hides: [inner_lo, inner_hi) */
    int64_t lo[TILE_ROWS], hi[TILE_ROWS]; /* keys row m's interval lets it see: [lo[m], hi[m]) */
    int64_t position[TILE_ROWS];
    int64_t head[TILE_ROWS], row[TILE_ROWS];
    char *query_row[TILE_ROWS], *out_row[TILE_ROWS];
    char *mask[TILE_ROWS], *bias[TILE_ROWS]; /* of key 0 */
    panel *query;                            /* [head_dim / REDUCTION][vectors] */
    vec *out;                                /* [head_dim_v][vectors], unnormalised */
} tile;

/* Rows in use of a tile's vector m. */
FA_INLINE int rows_of_vector(const tile *t, int m)
{
    return t->rows - m * LANES < LANES ? t->rows - m * LANES : LANES;
}

/* A block of K or V as operands: row r (a key, or REDUCTION of them for V) starts at
 * data + (r - first) * row. */
typedef struct {
    const char *data;
    int64_t first;
    ptrdiff_t row, col;
} operand_block;

typedef struct {
    tile *tiles;
    vec *scores; /* [KEY_BLOCK][vectors]; becomes the probabilities */
    char *key_stage, *value_stage;
} workspace;

FA_INLINE int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

FA_INLINE int64_t max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

FA_INLINE void *take(char *base, size_t *offset, size_t bytes)
{
    size_t start = *offset;
    *offset = start + (bytes + 63) / 64 * 64;
    return base ? base + start : NULL;
}

/* Lays out the scratch of an item of `num_tiles` tiles at `base`; with NULL, only sizes it. */
static size_t lay_out(const fa_problem *p, int num_tiles, char *base, workspace *w)
{
    const size_t vector_row = MAX_VECTORS * sizeof(vec);
    const size_t out_rows = (size_t)p->head_dim_v + MAX_MICRO_ROWS; /* the last micro-tile stores whole */
    size_t offset = 0;
    w->tiles = take(base, &offset, (size_t)num_tiles * sizeof(tile));
    for (int t = 0; t < num_tiles; t++) {
        void *query = take(base, &offset, (size_t)(p->head_dim + 1) / REDUCTION * vector_row);
        void *out = take(base, &offset, out_rows * vector_row);
        if (base) {
            w->tiles[t].query = query;
            w->tiles[t].out = out;
        }
    }
    w->scores = take(base, &offset, (KEY_BLOCK + MAX_MICRO_ROWS) * vector_row);
    bool stages_key = !key_is_operand(&p->key, p->head_dim);
    bool stages_value = !value_is_operand(&p->value);
    w->key_stage = take(base, &offset, stages_key ? KEY_BLOCK * (size_t)staged_row_bytes(p->head_dim) : 0);
    w->value_stage =
        take(base, &offset, stages_value ? KEY_BLOCK * (size_t)staged_row_bytes(p->head_dim_v) : 0);
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

#endif

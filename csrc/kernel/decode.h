/* Products of a decode tile. A few query rows leave next to no arithmetic: what counts is to read K and V
 * once, at the speed of memory, in place. The score panel holds the scores of key after key, `rows_pow2` rows
 * each.
 *
 *     multiply_decode_keys:  scores of all keys of a range, times `scale`
 *     add_decode_values:     out (+)= probabilities · V over the keys of a range, the first of the streams
 * that are read; nan_safe: where a probability is -0 the key is hidden from the row, and its value, be it
 * NaN, adds nothing
 *
 * decode_lanes.h fulfils it in the vector units, decode_tiles.h in the tile unit.
 *
 * Requires tile.h; provides multiply_decode_query_key and multiply_decode_value. */
#include "for_editors.h"

#ifndef FA_KERNEL_DECODE_H
#define FA_KERNEL_DECODE_H

#include "tile.h"

#if DECODES_IN_TILES
#include "decode_tiles.h"
#else
#include "decode_lanes.h"
#endif

/* The scales of the range's keys; of those that may not be read, the nearest one's. */
static void load_scales(const key_range *range, const operand_block *block, real *scales)
{
    const int lead = (int)(range->key_lo - range->first), end = (int)(range->key_hi - range->first);
    const char *src = block->scale + (range->key_lo - block->first) * block->scale_step;
    if (block->scale_step == sizeof(real) && FA_REAL_DTYPE == FA_FLOAT32) {
        memcpy(scales + lead, src, (size_t)(end - lead) * sizeof(real));
    } else {
        for (int n = lead; n < end; n++, src += block->scale_step)
            scales[n] = load_element(src, FA_FLOAT32);
    }
    for (int n = 0; n < lead; n++)
        scales[n] = scales[lead];
    for (int n = end; n < num_keys(range); n++)
        scales[n] = scales[end - 1];
}

/* Multiplies the panel's rows by the scales of their keys, or of their values. */
static void multiply_by_scales(const tile *t, const key_range *range, const operand_block *block, vec *panel)
{
    real scales[DECODE_KEYS + LANES] = {0};
    load_scales(range, block, scales);
    for (int v = 0; v < num_keys(range) >> t->key_shift; v++) {
        vec x = vec_load(scales + (v << t->key_shift));
        for (int r = 1; r < t->rows_pow2; r *= 2) /* each key's, side by side for its rows */
            x = SHUFFLE(x, x, INTERLEAVE_LOW);
        panel[v] *= x;
    }
}

static void multiply_decode_query_key(const fa_problem *p, const tile *t, const key_range *range,
                                      const operand_block *key, const next_streams *next, real scale,
                                      vec *scores)
{
    multiply_decode_keys(p, t, range, key, next, scale, scores);
    if (key->scale)
        multiply_by_scales(t, range, key, scores);
}

static void multiply_decode_value(const fa_problem *p, const tile *t, const key_range *range,
                                  const operand_block *value, vec *probabilities, const row_stream *streams,
                                  bool nan_safe)
{
    if (value->scale)
        multiply_by_scales(t, range, value, probabilities);
    add_decode_values(p, t, range, value, probabilities, streams, nan_safe);
}

#endif

/* Which probabilities a seed drops. Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers:
 * as easy as 1, 2, 3", SC 2011) makes numbers of a counter, which here is where the probability is:
 *
 *     (key / 8, the row's position, query head, batch item) -> 4 words, 8 numbers of 16 bits,
 *
 * the one of key n being half n % 2 of word n % 8 / 2. A probability is dropped if its number is below 2^16
 * times the share that is to be dropped. Lanes are rows, as everywhere, so a vector of counters gives the
 * numbers of eight rows of the panel: some 120 operations, 15 a row, where a row takes 2 (D + Dv)
 * multiply-adds.
 *
 * Requires tile.h; provides drop_probabilities and drop_packed. */
#include "for_editors.h"

#ifndef FA_KERNEL_DROPOUT_H
#define FA_KERNEL_DROPOUT_H

#include "tile.h"

#define KEYS_PER_COUNTER 8
#define PHILOX_ROUNDS 10

/* Words are 32 bits wide in lanes of 64, of which the upper halves hold anything: products read the lower
 * ones. Lanes of float32 are two such vectors, the even ones and the odd ones. */
typedef uint64_t word_vec __attribute__((vector_size(FA_VECTOR_BYTES)));
#define WORD_VECTORS (FA_REAL_BYTES == 4 ? 2 : 1)

/* Products of 32 bits by 32, in 64. */
#ifndef multiply_words
FA_INLINE word_vec multiply_words(word_vec a, uint32_t b)
{
    return (a & 0xffffffff) * b;
}
#endif

FA_INLINE bool has_dropout(const fa_problem *p)
{
    return p->dropout > 0;
}

/* What the probabilities that are left are multiplied by. */
FA_INLINE real kept_factor(const fa_problem *p)
{
    return (real)(1 / (1 - p->dropout));
}

/* A number below it is dropped. */
FA_INLINE uint32_t dropout_threshold(const fa_problem *p)
{
    return (uint32_t)nearbyint(p->dropout * 65536);
}

/* Counters -> words, in place, `chains` of them at a time: a round waits for the one before. */
FA_INLINE void philox(word_vec c[][4], int chains, uint64_t seed)
{
    uint32_t key_0 = (uint32_t)seed, key_1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
#pragma GCC unroll 6
        for (int i = 0; i < chains; i++) {
            const word_vec a = multiply_words(c[i][0], 0xD2511F53), b = multiply_words(c[i][2], 0xCD9E8D57);
            c[i][0] = (b >> 32) ^ c[i][1] ^ key_0;
            c[i][2] = (a >> 32) ^ c[i][3] ^ key_1;
            c[i][1] = b;
            c[i][3] = a;
        }
        key_0 += 0x9E3779B9;
        key_1 += 0xBB67AE85;
    }
}

/* Words of the `vectors` lanes for keys [KEYS_PER_COUNTER * group, ...). */
FA_INLINE void dropout_words(const fa_problem *p, const tile *t, int64_t group, int vectors,
                             uvec words[4][MAX_VECTORS])
{
    word_vec c[MAX_VECTORS * WORD_VECTORS][4];
#pragma GCC unroll 6
    for (int i = 0; i < vectors * WORD_VECTORS; i++) {
        const int m = i / WORD_VECTORS, shift = i % WORD_VECTORS * 32;
        c[i][0] = (uint64_t)group - (word_vec){0};
        c[i][1] = (word_vec)t->drop_position[m] >> shift;
        c[i][2] = (word_vec)t->drop_head[m] >> shift;
        c[i][3] = (uint64_t)t->drop_item - (word_vec){0};
    }
    philox(c, vectors * WORD_VECTORS, p->seed);
    for (int m = 0; m < vectors; m++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const word_vec *even = c[m * WORD_VECTORS];
            words[i][m] = (uvec)(even[i] & 0xffffffff);
            if (WORD_VECTORS > 1)
                words[i][m] |= (uvec)(c[m * WORD_VECTORS + WORD_VECTORS - 1][i] << 32);
        }
}

/* A probability that is dropped gets a sign. */
FA_INLINE vec mark_dropped(vec probability, uvec number, uint32_t threshold)
{
    const ivec sign = (ivec)vec_splat((real)-0.0);
    return (vec)((ivec)probability | (((ivec)number - (lane_int)threshold) & sign));
}

/* 0 for what has a sign; -0, which is hidden, stays. */
FA_INLINE vec without_dropped(vec probability)
{
    return vec_max(vec_splat(0), probability);
}

/* Of panel rows [0, rows), the first of which is key `first`. `marks`: dropped ones get a sign; else they are
 * 0. */
FA_INLINE void drop_rows(const fa_problem *p, const tile *t, int64_t first, int rows, int vectors, bool marks,
                         vec *panel)
{
    const uint32_t threshold = dropout_threshold(p);
    for (int64_t group = first / KEYS_PER_COUNTER; group * KEYS_PER_COUNTER < first + rows; group++) {
        uvec words[4][MAX_VECTORS];
        dropout_words(p, t, group, vectors, words);
        for (int i = 0; i < KEYS_PER_COUNTER; i++) {
            const int64_t r = group * KEYS_PER_COUNTER + i - first;
            if (r < 0 || r >= rows)
                continue;
            for (int m = 0; m < vectors; m++) {
                vec *x = &panel[r * vectors + m];
                *x = mark_dropped(*x, (words[i / 2][m] >> (i % 2 * 16)) & 0xffff, threshold);
                if (!marks)
                    *x = without_dropped(*x);
            }
        }
    }
}

static __attribute__((noinline)) void drop_probabilities(const fa_problem *p, const tile *t, int64_t first,
                                                         int rows, bool marks, vec *panel)
{
    WITH_VECTORS(t->vectors, drop_rows(p, t, first, rows, VECTORS, marks, panel));
}

#if IS_PIPELINED
/* The same of probabilities in pairs of keys, [key / 2][MAX_VECTORS], in `parts` that lie `part` vectors
 * apart; the first key is a multiple of KEYS_PER_COUNTER. */
static __attribute__((noinline)) void drop_packed(const fa_problem *p, const tile *t, int64_t first, int keys,
                                                  int parts, int part, packed_vec *probabilities)
{
    const uint32_t threshold = dropout_threshold(p);
    if (threshold > 0xffff) /* which no half reaches */
        memset(probabilities, 0, (size_t)parts * (size_t)part * sizeof *probabilities);
    for (int n = 0; n < keys && threshold <= 0xffff; n += KEYS_PER_COUNTER) {
        uvec words[4][MAX_VECTORS];
        dropout_words(p, t, (first + n) / KEYS_PER_COUNTER, MAX_VECTORS, words);
        for (int i = 0; i < 4; i++)
            for (int m = 0; m < MAX_VECTORS; m++) {
                const halves kept = (halves)((halves)words[i][m] >= (uint16_t)threshold);
                packed_vec *x = &probabilities[(n / 2 + i) * MAX_VECTORS + m];
                for (int k = 0; k < parts; k++)
                    x[k * part] = (packed_vec)((uvec)x[k * part] & (uvec)kept);
            }
    }
}
#endif

#endif

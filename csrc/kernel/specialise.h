/* Copies of a call for each constant that its code is compiled for: what the data tell at run time is known
 * in them, and loops over it are unrolled. The only place where such constants are listed.
 *
 * Requires tile sizes; provides WITH_DTYPE, WITH_DECODE_ROWS and WITH_VECTORS. */
#include "for_editors.h"

#ifndef FA_KERNEL_SPECIALISE_H
#define FA_KERNEL_SPECIALISE_H

#include "vec_types.h"

/* clang-format off */

#define FA_CASE(value, type, name, condition, ...)                                                           \
    case value:                                                                                              \
        if (condition) {                                                                                     \
            const type name = value;                                                                         \
            __VA_ARGS__;                                                                                     \
        }                                                                                                    \
        break;

/* The call with DTYPE for `dtype`, if that `is_meant`. */
#define WITH_DTYPE(dtype, is_meant, ...)                                                                     \
    switch (dtype) {                                                                                         \
    FA_CASE(FA_FLOAT32, fa_dtype, DTYPE, is_meant(FA_FLOAT32), __VA_ARGS__)                                  \
    FA_CASE(FA_FLOAT64, fa_dtype, DTYPE, is_meant(FA_FLOAT64), __VA_ARGS__)                                  \
    FA_CASE(FA_FLOAT16, fa_dtype, DTYPE, is_meant(FA_FLOAT16), __VA_ARGS__)                                  \
    FA_CASE(FA_BFLOAT16, fa_dtype, DTYPE, is_meant(FA_BFLOAT16), __VA_ARGS__)                                \
    FA_CASE(FA_INT8, fa_dtype, DTYPE, is_meant(FA_INT8), __VA_ARGS__)                                        \
    }

/* The call with ROWS for `rows`, a power of two up to DECODE_ROWS. */
#define WITH_DECODE_ROWS(rows, ...)                                                                          \
    switch (rows) {                                                                                          \
    FA_CASE(16, int, ROWS, DECODE_ROWS >= 16, __VA_ARGS__)                                                   \
    FA_CASE(8, int, ROWS, DECODE_ROWS >= 8, __VA_ARGS__)                                                     \
    FA_CASE(4, int, ROWS, DECODE_ROWS >= 4, __VA_ARGS__)                                                     \
    FA_CASE(2, int, ROWS, DECODE_ROWS >= 2, __VA_ARGS__)                                                     \
    FA_CASE(1, int, ROWS, true, __VA_ARGS__)                                                                 \
    }

/* The call with VECTORS for `vectors`, from MIN_VECTORS to MAX_VECTORS. */
#define WITH_VECTORS(vectors, ...)                                                                           \
    switch (MIN_VECTORS == MAX_VECTORS ? MAX_VECTORS : (vectors)) {                                          \
    FA_CASE(1, int, VECTORS, MIN_VECTORS <= 1, __VA_ARGS__)                                                  \
    FA_CASE(2, int, VECTORS, MIN_VECTORS <= 2 && MAX_VECTORS >= 2, __VA_ARGS__)                              \
    FA_CASE(3, int, VECTORS, MAX_VECTORS >= 3, __VA_ARGS__)                                                  \
    }
/* clang-format on */

_Static_assert(MAX_VECTORS <= 3, "as many as WITH_VECTORS has");

#endif

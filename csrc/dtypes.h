/* What there is to know of each dtype of queries, keys and values: a row each. */
#ifndef FA_DTYPES_H
#define FA_DTYPES_H

#include "fastattn.h"

typedef struct {
    int bytes;
    fa_dtype computed_in;  /* where there is a kernel for it: FA_FLOAT32, FA_FLOAT64 or FA_BFLOAT16 */
    bool is_half;          /* 2 bytes that vectors of float32 load and store */
    bool is_deinterleaved; /* in a decode tile: upcast two vectors at a time, even elements first, then odd */
    bool is_dear;          /* to upcast an element takes longer than to read it */
} fa_dtype_traits;

static inline __attribute__((always_inline)) fa_dtype_traits fa_traits(fa_dtype dtype)
{
    switch (dtype) {
    case FA_FLOAT32:
        return (fa_dtype_traits){4, FA_FLOAT32, false, false, false};
    case FA_FLOAT64:
        return (fa_dtype_traits){8, FA_FLOAT64, false, false, false};
    case FA_FLOAT16:
        return (fa_dtype_traits){2, FA_FLOAT32, true, false, false};
    case FA_BFLOAT16: /* shifts and masks are cheaper than moving halves to lanes */
        return (fa_dtype_traits){2, FA_BFLOAT16, true, true, false};
    case FA_INT8:
        return (fa_dtype_traits){1, FA_FLOAT32, false, false, true};
    }
    __builtin_unreachable();
}

#endif

/* Which kernel computes a problem. */
#ifndef FA_DISPATCH_H
#define FA_DISPATCH_H

#include "kernel.h"

/* The kernel of a head group of `rows` query rows that sees `keys` keys. */
const fa_kernel *fa_select_kernel(const fa_problem *problem, int64_t rows, int64_t keys);
/* The kernel of the backward pass. */
const fa_kernel *fa_select_backward_kernel(const fa_problem *problem);
/* The kernel that computes in the precision of `dtype`. */
const fa_kernel *fa_kernel_for_dtype(fa_dtype dtype);
/* The kernel of this name in the instruction set in use, or NULL. */
const fa_kernel *fa_find_kernel(const char *name);

#endif

/* Which kernel computes a problem. */
#ifndef FA_DISPATCH_H
#define FA_DISPATCH_H

#include "kernel.h"

/* The kernel for a head group of so many rows. */
const fa_kernel *fa_select_kernel(const fa_problem *problem, int64_t group_rows);
/* The kernel that computes in the precision of `dtype`. */
const fa_kernel *fa_kernel_for_dtype(fa_dtype dtype);
/* The kernel of this name in the instruction set in use, or NULL. */
const fa_kernel *fa_find_kernel(const char *name);

#endif

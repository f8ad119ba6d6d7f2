/* Kernels that compute in float64.
 *
 * Provides real and its integers. */
#ifndef FA_KERNEL_ELEMENT_H
#define FA_KERNEL_ELEMENT_H

#include "../fastattn.h"

typedef double real;
typedef int64_t lane_int;
typedef uint64_t lane_uint;
#define FA_REAL_BYTES 8
#define FA_REAL_DTYPE FA_FLOAT64

#endif

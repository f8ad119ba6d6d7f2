/* Kernels that compute in float32.
 *
 * Provides real and its integers. */
#ifndef FA_KERNEL_ELEMENT_H
#define FA_KERNEL_ELEMENT_H

#include "../fastattn.h"

typedef float real;
typedef int32_t lane_int;
typedef uint32_t lane_uint;
#define FA_REAL_BYTES 4
#define FA_REAL_DTYPE FA_FLOAT32

#endif

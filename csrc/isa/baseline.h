/* Whatever the compiler's default target has, in GNU vectors alone: 16-byte vectors, no overrides.
 *
 * Registers of the micro-kernel at 4 × 2: 8 accumulators + 2 panel vectors + 2 products = 12/16. */
#ifndef FA_KERNEL_ELEMENT_H /* in an editor */
#include "../kernel/element_float32.h"
#endif

#ifndef FA_ISA_BASELINE_H
#define FA_ISA_BASELINE_H

#define FA_VECTOR_BYTES 16
#define MAX_VECTORS 3
#define MIN_VECTORS 1
#define MICRO_ROWS(vectors) 4

#include "../kernel/vec_types.h"

#endif

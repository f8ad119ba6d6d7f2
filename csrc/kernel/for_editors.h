/* What a kernel's source file includes first, for a header that is opened or compiled alone. */
#ifndef FA_KERNEL_ELEMENT_H
#define FA_KERNEL fa_in_an_editor
#define FA_NAME "none"
#define FA_ISA "none"
#include "element_float32.h"
#include "../isa/baseline.h"
#include "operand_real.h"
#include "product_fma.h"
#endif

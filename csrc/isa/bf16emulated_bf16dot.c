/* Compiled and checked by make check-c; no part of the library. */
#define FA_KERNEL fa_bf16dot_bf16_emulated
#define FA_NAME "bf16dot"
#define FA_ISA "bf16-emulated"

#include "../kernel/element_float32.h"
#include "bf16emulated.h"
#include "../kernel/operand_bf16dot.h"
#include "../kernel/product_fma.h"
#include "../kernel/forward.h"

#define FA_KERNEL fa_bf16dot_neonbf16
#define FA_NAME "bf16dot"
#define FA_ISA "neonbf16"

#include "../kernel/element_float32.h"
#include "neonbf16.h"
#include "../kernel/operand_bf16dot.h"
#include "../kernel/product_fma.h"
#include "../kernel/forward.h"

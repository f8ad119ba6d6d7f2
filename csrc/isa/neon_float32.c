#define FA_KERNEL fa_float32_neon
#define FA_NAME "float32"
#define FA_ISA "neon"

#include "../kernel/element_float32.h"
#include "neon.h"
#include "../kernel/operand_real.h"
#include "../kernel/product_fma.h"
#include "../kernel/forward.h"

#define FA_KERNEL fa_float64_neon
#define FA_NAME "float64"
#define FA_ISA "neon"

#include "../kernel/element_float64.h"
#include "neon.h"
#include "../kernel/operand_real.h"
#include "../kernel/product_fma.h"
#include "../kernel/forward.h"

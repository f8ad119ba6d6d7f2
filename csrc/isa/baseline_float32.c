#define FA_KERNEL fa_float32_baseline
#define FA_NAME "float32"
#define FA_ISA "baseline"

#include "../kernel/element_float32.h"
#include "baseline.h"
#include "../kernel/operand_real.h"
#include "../kernel/product_fma.h"
#include "../kernel/forward.h"

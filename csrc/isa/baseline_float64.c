#define FA_KERNEL fa_float64_baseline
#define FA_NAME "float64"
#define FA_ISA "baseline"

#include "../kernel/element_float64.h"
#include "baseline.h"
#include "../kernel/operand_real.h"
#include "../kernel/product_fma.h"
#include "../kernel/forward.h"

#define FA_KERNEL fa_float32_avx512
#define FA_NAME "float32"
#define FA_ISA "avx512"

#include "../kernel/element_float32.h"
#include "avx512.h"
#include "../kernel/operand_real.h"
#include "../kernel/product_fma.h"
#include "../kernel/forward.h"

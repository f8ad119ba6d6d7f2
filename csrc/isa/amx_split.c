#define FA_KERNEL fa_split_amx
#define FA_NAME "split"
#define FA_ISA "amx"

#include "../kernel/element_float32.h"
#include "amx.h"
#include "../kernel/operand_split.h"
#include "../kernel/product_amx.h"
#include "../kernel/forward.h"

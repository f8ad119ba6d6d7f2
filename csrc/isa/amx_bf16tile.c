#define FA_KERNEL fa_bf16tile_amx
#define FA_NAME "bf16tile"
#define FA_ISA "amx"

#include "../kernel/element_float32.h"
#include "amx.h"
#include "../kernel/operand_amx.h"
#include "../kernel/product_amx.h"
#include "../kernel/forward.h"

/* The kernel of the tile unit with the unit emulated: for tests on CPUs without it. */
#define FA_EMULATE_TILES
#define FA_KERNEL fa_split_amx_emulated
#define FA_NAME "split"
#define FA_ISA "amx-emulated"

#include "../kernel/element_float32.h"
#include "amx.h"
#include "../kernel/operand_split.h"
#include "../kernel/product_amx.h"
#include "../kernel/forward.h"

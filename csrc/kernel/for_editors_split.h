/* for_editors.h of the header for split numbers, which needs the tile unit's instruction set. */
#ifndef FA_KERNEL_ELEMENT_H
#define FA_KERNEL fa_in_an_editor
#define FA_NAME "none"
#define FA_ISA "none"
#include "element_float32.h"
#include "../isa/amx.h"
#include "operand_split.h"
#include "product_amx.h"
#endif

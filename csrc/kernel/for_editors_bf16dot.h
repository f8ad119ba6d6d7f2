/* for_editors.h of headers that need bfloat16 dot products. */
#ifndef FA_KERNEL_ELEMENT_H
#define FA_KERNEL fa_in_an_editor
#define FA_NAME "none"
#define FA_ISA "none"
#include "element_float32.h"
#include "../isa/avx512bf16.h"
#include "operand_bf16dot.h"
#include "product_fma.h"
#endif

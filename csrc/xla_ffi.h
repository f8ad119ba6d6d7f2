/* What XLA's foreign function interface, version 0 (openxla.org/xla/custom_call), hands to a function that it
 * calls, as far as it is read here. Layouts and names are XLA's. Sizes are checked where a structure is read.
 */
#ifndef FA_XLA_FFI_H
#define FA_XLA_FFI_H

#include <stddef.h>
#include <stdint.h>

typedef struct XLA_FFI_Extension_Base {
    size_t struct_size;
    int type;
    struct XLA_FFI_Extension_Base *next;
} XLA_FFI_Extension_Base;

enum { XLA_FFI_Extension_Metadata = 1 };

typedef struct {
    size_t struct_size;
    XLA_FFI_Extension_Base *extension_start;
    int major_version, minor_version;
} XLA_FFI_Api_Version;

/* The minor version whose structures these are; later ones only add to them. */
enum { XLA_FFI_MAJOR = 0, XLA_FFI_MINOR = 1 };

typedef struct {
    size_t struct_size;
    XLA_FFI_Api_Version api_version;
    uint32_t traits;
} XLA_FFI_Metadata;

typedef struct {
    XLA_FFI_Extension_Base extension_base;
    XLA_FFI_Metadata *metadata;
} XLA_FFI_Metadata_Extension;

typedef struct XLA_FFI_Error XLA_FFI_Error;

enum { XLA_FFI_INVALID_ARGUMENT = 3, XLA_FFI_RESOURCE_EXHAUSTED = 8 };

typedef struct {
    size_t struct_size;
    XLA_FFI_Extension_Base *extension_start;
    const char *message;
    int errc;
} XLA_FFI_Error_Create_Args;

typedef struct {
    size_t struct_size;
    XLA_FFI_Extension_Base *extension_start;
    XLA_FFI_Api_Version api_version;
    const void *internal_api;
    XLA_FFI_Error *(*Error_Create)(XLA_FFI_Error_Create_Args *args);
} XLA_FFI_Api;

typedef struct {
    size_t struct_size;
    XLA_FFI_Extension_Base *extension_start;
    int dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
} XLA_FFI_Buffer;

typedef struct {
    const char *ptr;
    size_t len;
} XLA_FFI_ByteSpan;

typedef struct {
    size_t struct_size;
    XLA_FFI_Extension_Base *extension_start;
    int64_t size;
    int *types;
    void **buffers;
} XLA_FFI_Buffers; /* XLA_FFI_Args and XLA_FFI_Rets */

typedef struct {
    size_t struct_size;
    XLA_FFI_Extension_Base *extension_start;
    int64_t size;
    int *types;
    XLA_FFI_ByteSpan **names;
    void **attrs;
} XLA_FFI_Attrs;

enum { XLA_FFI_AttrType_STRING = 4 };

typedef struct {
    size_t struct_size;
    XLA_FFI_Extension_Base *extension_start;
    const XLA_FFI_Api *api;
    void *ctx;
    int stage;
    XLA_FFI_Buffers args, rets;
    XLA_FFI_Attrs attrs;
} XLA_FFI_CallFrame;

#endif

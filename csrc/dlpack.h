/* DLPack 1.x as far as arrays come and go by it: how a tensor is described, and the table of functions by
 * which a library describes and makes its own (dmlc.github.io/dlpack). Layouts and names are the standard's.
 */
#ifndef FA_DLPACK_H
#define FA_DLPACK_H

#include <stdint.h>

typedef struct {
    int32_t device_type; /* kDLCPU, or memory that is not read here */
    int32_t device_id;
} DLDevice;

enum { kDLCPU = 1 };

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} DLDataType;

enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL: C order */
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

typedef struct {
    uint32_t major, minor;
} DLPackVersion;

enum { DLPACK_READ_ONLY = 1 };

typedef struct DLManagedTensorVersioned {
    DLPackVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self);
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

typedef struct DLPackExchangeHeader {
    DLPackVersion version;
    struct DLPackExchangeHeader *older; /* the table of an earlier major version */
} DLPackExchangeHeader;

/* Each returns 0, or -1 with a Python exception set. Borrowed descriptions last as long as their tensor. */
typedef struct {
    DLPackExchangeHeader header;
    int (*allocate)(DLTensor *prototype, DLManagedTensorVersioned **out, void *context,
                    void (*set_error)(void *context, const char *kind, const char *message));
    int (*export_owned)(void *object, DLManagedTensorVersioned **out);
    int (*import_owned)(DLManagedTensorVersioned *tensor, void **out);
    int (*describe_borrowed)(void *object, DLTensor *out); /* may be NULL */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
} DLPackExchangeTable;

#endif

# csrc/fastattn.h as Cython sees it.
from libc.stdint cimport int64_t, uint64_t


cdef extern from "stdbool.h":
    ctypedef bint c_bool "bool"


cdef extern from "dlpack.h" nogil:
    enum:
        kDLCPU
        kDLInt, kDLUInt, kDLFloat, kDLBfloat, kDLBool
        DLPACK_READ_ONLY

    ctypedef struct DLDevice:
        int device_type, device_id

    ctypedef struct DLDataType:
        unsigned char code, bits
        unsigned short lanes

    ctypedef struct DLTensor:
        void *data
        DLDevice device
        int ndim
        DLDataType dtype
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset

    ctypedef struct DLManagedTensor:
        DLTensor dl_tensor

    ctypedef struct DLPackVersion:
        unsigned int major, minor

    ctypedef struct DLManagedTensorVersioned:
        DLPackVersion version
        uint64_t flags
        DLTensor dl_tensor

    ctypedef struct DLPackExchangeHeader:
        DLPackVersion version
        DLPackExchangeHeader *older

    ctypedef struct DLPackExchangeTable:
        DLPackExchangeHeader header
        int (*allocate)(DLTensor *, DLManagedTensorVersioned **, void *,
                        void (*)(void *, const char *, const char *) noexcept) except -1 with gil
        int (*import_owned)(DLManagedTensorVersioned *, void **) except -1 with gil
        int (*describe_borrowed)(void *, DLTensor *) except -1 with gil


cdef extern from "xla_ffi.h" nogil:
    enum:
        XLA_FFI_Extension_Metadata
        XLA_FFI_MAJOR, XLA_FFI_MINOR
        XLA_FFI_INVALID_ARGUMENT, XLA_FFI_RESOURCE_EXHAUSTED
        XLA_FFI_AttrType_STRING

    ctypedef struct XLA_FFI_Extension_Base:
        size_t struct_size
        int type

    ctypedef struct XLA_FFI_Api_Version:
        int major_version, minor_version

    ctypedef struct XLA_FFI_Metadata:
        XLA_FFI_Api_Version api_version
        unsigned int traits

    ctypedef struct XLA_FFI_Metadata_Extension:
        XLA_FFI_Metadata *metadata

    ctypedef struct XLA_FFI_Error:
        pass

    ctypedef struct XLA_FFI_Error_Create_Args:
        size_t struct_size
        XLA_FFI_Extension_Base *extension_start
        const char *message
        int errc

    ctypedef struct XLA_FFI_Api:
        XLA_FFI_Error *(*Error_Create)(XLA_FFI_Error_Create_Args *args) noexcept

    ctypedef struct XLA_FFI_Buffer:
        int dtype
        void *data
        int64_t rank
        int64_t *dims

    ctypedef struct XLA_FFI_ByteSpan:
        const char *ptr
        size_t len

    ctypedef struct XLA_FFI_Buffers:
        int64_t size
        void **buffers

    ctypedef struct XLA_FFI_Attrs:
        int64_t size
        int *types
        void **attrs

    ctypedef struct XLA_FFI_CallFrame:
        size_t struct_size
        XLA_FFI_Extension_Base *extension_start
        const XLA_FFI_Api *api
        XLA_FFI_Buffers args, rets
        XLA_FFI_Attrs attrs


cdef extern from "fastattn.h" nogil:
    enum:
        FA_MAX_BATCH_DIMS
        FA_MAX_HEAD_DIM
        FA_UNBOUNDED

    ctypedef enum fa_dtype:
        FA_FLOAT32, FA_FLOAT64, FA_FLOAT16, FA_BFLOAT16, FA_INT8

    ctypedef enum fa_status:
        FA_OK, FA_NO_MEMORY, FA_INTERRUPTED

    ctypedef struct fa_array:
        char *data
        fa_dtype dtype
        Py_ssize_t batch[16]
        Py_ssize_t head, row, col
        Py_ssize_t page

    ctypedef struct fa_gradients:
        fa_array grad_out, grad_lse
        fa_array grad_query, grad_key, grad_value
        fa_array grad_bias, delta

    ctypedef struct fa_problem:
        int batch_ndim
        int64_t batch_shape[16]
        int64_t num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v
        fa_array query, key, value, mask, bias, alibi_slopes, sinks, key_lengths, query_offset
        fa_array key_scale, value_scale
        int64_t top_count
        fa_array top_indices, top_weights, column_sums
        double fixed_point_scale
        fa_array out, lse, weights
        c_bool adds
        const int64_t *cu_seqlens_q
        const int64_t *cu_seqlens_k
        fa_array page_table
        int64_t page_size
        double scale, softcap, dropout
        uint64_t seed
        int64_t left, right
        int num_threads
        c_bool (*interrupted)() noexcept nogil
        const fa_gradients *gradients

    ctypedef struct fa_plan:
        const char *isa
        const char *kernel
        c_bool is_decode
        int tile_rows, key_block, tiles_per_item
        int64_t num_splits, num_items
        int num_threads
        size_t scratch_bytes, shared_bytes

    fa_status fa_plan_problem(const fa_problem *problem, fa_plan *plan)
    fa_status fa_forward(const fa_problem *problem)
    fa_status fa_backward(const fa_problem *problem)
    fa_status fa_bias_gradient(const fa_problem *problem)

    ctypedef struct fa_merge_problem:
        int batch_ndim
        int64_t batch_shape[16]
        int64_t num_heads, seqlen, columns, num_sets
        const fa_array *outs
        const fa_array *lses
        fa_array out, lse
        int num_threads
        c_bool (*interrupted)() noexcept nogil

    fa_status fa_merge(const fa_merge_problem *problem)

    ctypedef struct fa_isa:
        const char *name
        const char *needs
        c_bool is_supported

    c_bool fa_describe_isa(int index, fa_isa *isa)
    const char *fa_selected_isa()
    c_bool fa_select_isa(const char *name)
    ctypedef enum fa_split_mode:
        FA_SPLIT_NEVER
        FA_SPLIT_IF_FASTER
        FA_SPLIT_ALWAYS

    void fa_set_split_mode(fa_split_mode mode)
    c_bool fa_splits()
    int fa_get_num_threads()
    void fa_set_num_threads(int num_threads)
    double fa_measure_peak(fa_dtype dtype, int num_threads)

    ctypedef struct fa_limits:
        double flops, scores
        c_bool runs_side_by_side

    c_bool fa_measure_limits(const char *kernel, c_bool is_decode, int num_threads, fa_limits *limits)
    double fa_measure_bandwidth(const void *data, size_t size, int num_threads)


cdef extern from "cpu.h" nogil:
    int fa_quota_cpus(const char *root)
    void fa_assume_cpus(int cpus)

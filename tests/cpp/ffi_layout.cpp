// csrc/xla/ffi.hpp beside XLA's own header: compiled by tests/test_jax_ffi.py, and that is the
// test.
#include <cstddef>
#include <type_traits>

#include "xla/ffi.hpp"
#include "xla/ffi/api/c_api.h"

namespace {

using namespace adamax::xla;

// XLA may add members to the end of a structure, so ours are no longer than its own.
#define SAME_SIZE(ours, theirs) static_assert(sizeof(ours) == sizeof(theirs))
#define SAME(ours, member, theirs, their_member)                            \
  static_assert(offsetof(ours, member) == offsetof(theirs, their_member) && \
                sizeof(ours::member) == sizeof(decltype(theirs::their_member)))
#define SAME_HEAD(ours, theirs)                 \
  SAME(ours, struct_size, theirs, struct_size); \
  SAME(ours, extensions, theirs, extension_start)
#define SAME_VALUE(ours, theirs) static_assert(static_cast<int>(ours) == static_cast<int>(theirs))

SAME_SIZE(Extension, XLA_FFI_Extension_Base);
SAME(Extension, struct_size, XLA_FFI_Extension_Base, struct_size);
SAME(Extension, type, XLA_FFI_Extension_Base, type);
SAME(Extension, next, XLA_FFI_Extension_Base, next);

SAME_SIZE(Version, XLA_FFI_Api_Version);
SAME_HEAD(Version, XLA_FFI_Api_Version);
SAME(Version, major_version, XLA_FFI_Api_Version, major_version);
SAME(Version, minor_version, XLA_FFI_Api_Version, minor_version);

static_assert(sizeof(Metadata) <= sizeof(XLA_FFI_Metadata));  // newer ones have one member more
SAME(Metadata, struct_size, XLA_FFI_Metadata, struct_size);
SAME(Metadata, version, XLA_FFI_Metadata, api_version);
SAME(Metadata, traits, XLA_FFI_Metadata, traits);

SAME_SIZE(MetadataExtension, XLA_FFI_Metadata_Extension);
SAME(MetadataExtension, base, XLA_FFI_Metadata_Extension, extension_base);
SAME(MetadataExtension, metadata, XLA_FFI_Metadata_Extension, metadata);

SAME_SIZE(ErrorCreateArgs, XLA_FFI_Error_Create_Args);
SAME_HEAD(ErrorCreateArgs, XLA_FFI_Error_Create_Args);
SAME(ErrorCreateArgs, message, XLA_FFI_Error_Create_Args, message);
SAME(ErrorCreateArgs, code, XLA_FFI_Error_Create_Args, errc);

SAME_SIZE(StreamGetArgs, XLA_FFI_Stream_Get_Args);
SAME_HEAD(StreamGetArgs, XLA_FFI_Stream_Get_Args);
SAME(StreamGetArgs, context, XLA_FFI_Stream_Get_Args, ctx);
SAME(StreamGetArgs, stream, XLA_FFI_Stream_Get_Args, stream);

SAME_SIZE(DeviceMemoryAllocateArgs, XLA_FFI_DeviceMemory_Allocate_Args);
SAME_HEAD(DeviceMemoryAllocateArgs, XLA_FFI_DeviceMemory_Allocate_Args);
SAME(DeviceMemoryAllocateArgs, context, XLA_FFI_DeviceMemory_Allocate_Args, ctx);
SAME(DeviceMemoryAllocateArgs, size, XLA_FFI_DeviceMemory_Allocate_Args, size);
SAME(DeviceMemoryAllocateArgs, alignment, XLA_FFI_DeviceMemory_Allocate_Args, alignment);
SAME(DeviceMemoryAllocateArgs, data, XLA_FFI_DeviceMemory_Allocate_Args, data);

SAME_SIZE(DeviceMemoryFreeArgs, XLA_FFI_DeviceMemory_Free_Args);
SAME_HEAD(DeviceMemoryFreeArgs, XLA_FFI_DeviceMemory_Free_Args);
SAME(DeviceMemoryFreeArgs, context, XLA_FFI_DeviceMemory_Free_Args, ctx);
SAME(DeviceMemoryFreeArgs, size, XLA_FFI_DeviceMemory_Free_Args, size);
SAME(DeviceMemoryFreeArgs, data, XLA_FFI_DeviceMemory_Free_Args, data);

SAME_SIZE(DeviceOrdinalGetArgs, XLA_FFI_DeviceOrdinal_Get_Args);
SAME_HEAD(DeviceOrdinalGetArgs, XLA_FFI_DeviceOrdinal_Get_Args);
SAME(DeviceOrdinalGetArgs, context, XLA_FFI_DeviceOrdinal_Get_Args, ctx);
SAME(DeviceOrdinalGetArgs, device_ordinal, XLA_FFI_DeviceOrdinal_Get_Args, device_ordinal);

static_assert(sizeof(Api) <= sizeof(XLA_FFI_Api));
SAME_HEAD(Api, XLA_FFI_Api);
SAME(Api, version, XLA_FFI_Api, api_version);
SAME(Api, internal_api, XLA_FFI_Api, internal_api);
SAME(Api, error_create, XLA_FFI_Api, XLA_FFI_Error_Create);
SAME(Api, stream_get, XLA_FFI_Api, XLA_FFI_Stream_Get);
SAME(Api, device_memory_allocate, XLA_FFI_Api, XLA_FFI_DeviceMemory_Allocate);
SAME(Api, device_memory_free, XLA_FFI_Api, XLA_FFI_DeviceMemory_Free);
SAME(Api, device_ordinal_get, XLA_FFI_Api, XLA_FFI_DeviceOrdinal_Get);

SAME_SIZE(Buffer, XLA_FFI_Buffer);
SAME_HEAD(Buffer, XLA_FFI_Buffer);
SAME(Buffer, dtype, XLA_FFI_Buffer, dtype);
SAME(Buffer, data, XLA_FFI_Buffer, data);
SAME(Buffer, rank, XLA_FFI_Buffer, rank);
SAME(Buffer, dims, XLA_FFI_Buffer, dims);

SAME_SIZE(ByteSpan, XLA_FFI_ByteSpan);
SAME(ByteSpan, data, XLA_FFI_ByteSpan, ptr);
SAME(ByteSpan, size, XLA_FFI_ByteSpan, len);

SAME_SIZE(Scalar, XLA_FFI_Scalar);
SAME(Scalar, dtype, XLA_FFI_Scalar, dtype);
SAME(Scalar, value, XLA_FFI_Scalar, value);

SAME_SIZE(Buffers, XLA_FFI_Args);
SAME_HEAD(Buffers, XLA_FFI_Args);
SAME(Buffers, size, XLA_FFI_Args, size);
SAME(Buffers, types, XLA_FFI_Args, types);
SAME(Buffers, buffers, XLA_FFI_Args, args);
SAME_SIZE(Buffers, XLA_FFI_Rets);
SAME_HEAD(Buffers, XLA_FFI_Rets);
SAME(Buffers, size, XLA_FFI_Rets, size);
SAME(Buffers, types, XLA_FFI_Rets, types);
SAME(Buffers, buffers, XLA_FFI_Rets, rets);

SAME_SIZE(Attributes, XLA_FFI_Attrs);
SAME_HEAD(Attributes, XLA_FFI_Attrs);
SAME(Attributes, size, XLA_FFI_Attrs, size);
SAME(Attributes, types, XLA_FFI_Attrs, types);
SAME(Attributes, names, XLA_FFI_Attrs, names);
SAME(Attributes, values, XLA_FFI_Attrs, attrs);

SAME_SIZE(CallFrame, XLA_FFI_CallFrame);
SAME_HEAD(CallFrame, XLA_FFI_CallFrame);
SAME(CallFrame, api, XLA_FFI_CallFrame, api);
SAME(CallFrame, context, XLA_FFI_CallFrame, ctx);
SAME(CallFrame, stage, XLA_FFI_CallFrame, stage);
SAME(CallFrame, arguments, XLA_FFI_CallFrame, args);
SAME(CallFrame, results, XLA_FFI_CallFrame, rets);
SAME(CallFrame, attributes, XLA_FFI_CallFrame, attrs);
SAME(CallFrame, future, XLA_FFI_CallFrame, future);

SAME_VALUE(ExtensionType::kMetadata, XLA_FFI_Extension_Metadata);
SAME_VALUE(ErrorCode::kInvalidArgument, XLA_FFI_Error_Code_INVALID_ARGUMENT);
SAME_VALUE(ErrorCode::kResourceExhausted, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
SAME_VALUE(ErrorCode::kInternal, XLA_FFI_Error_Code_INTERNAL);
SAME_VALUE(DataType::kInt32, XLA_FFI_DataType_S32);
SAME_VALUE(DataType::kInt64, XLA_FFI_DataType_S64);
SAME_VALUE(DataType::kFloat16, XLA_FFI_DataType_F16);
SAME_VALUE(DataType::kFloat32, XLA_FFI_DataType_F32);
SAME_VALUE(DataType::kFloat64, XLA_FFI_DataType_F64);
SAME_VALUE(DataType::kBFloat16, XLA_FFI_DataType_BF16);
SAME_VALUE(ArgumentType::kBuffer, XLA_FFI_ArgType_BUFFER);
SAME_VALUE(ArgumentType::kBuffer, XLA_FFI_RetType_BUFFER);
SAME_VALUE(AttributeType::kScalar, XLA_FFI_AttrType_SCALAR);
SAME_VALUE(AttributeType::kString, XLA_FFI_AttrType_STRING);
SAME_VALUE(Stage::kInstantiate, XLA_FFI_ExecutionStage_INSTANTIATE);
SAME_VALUE(Stage::kPrepare, XLA_FFI_ExecutionStage_PREPARE);
SAME_VALUE(Stage::kInitialize, XLA_FFI_ExecutionStage_INITIALIZE);
SAME_VALUE(Stage::kExecute, XLA_FFI_ExecutionStage_EXECUTE);

static_assert(kMajorVersion == XLA_FFI_API_MAJOR && kMinorVersion <= XLA_FFI_API_MINOR);

}  // namespace

// What XLA's foreign function interface hands to a handler: the part of its C interface that a step
// needs, declared here, so that a build needs no jaxlib.
//
// It has been the same from jaxlib 0.4.38 on, and XLA keeps an interface version for a year at
// least; tests/test_jax_ffi.py compares every offset with xla/ffi/api/c_api.h of the jaxlib that is
// installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adamax::xla {

// The lowest version that has all of this: older and newer runtimes take it.
constexpr int kMajorVersion = 0;
constexpr int kMinorVersion = 1;

struct Error;    // opaque
struct Context;  // opaque: of one execution

enum class ExtensionType : int { kMetadata = 1 };
struct Extension {
  std::size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  std::size_t struct_size;
  Extension* extensions;
  int major_version;
  int minor_version;
};
struct Metadata {
  std::size_t struct_size;
  Version version;
  std::uint32_t traits;
};
// On a call that has it, a handler says what it is, and does nothing else.
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum class ErrorCode : int {
  kInvalidArgument = 3,
  kResourceExhausted = 8,
  kInternal = 13,
};
struct ErrorCreateArgs {
  std::size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};
struct StreamGetArgs {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  void* stream;  // out
};
struct DeviceMemoryAllocateArgs {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  std::size_t size;
  std::size_t alignment;
  void* data;  // out
};
struct DeviceMemoryFreeArgs {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  std::size_t size;
  void* data;
};
struct DeviceOrdinalGetArgs {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  std::int32_t device_ordinal;  // out
};

struct Api {
  std::size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal_api;
  Error* (*error_create)(ErrorCreateArgs*);
  const void* not_used_1[3];  // from error_get_message on
  Error* (*stream_get)(StreamGetArgs*);
  const void* not_used_2[4];  // from type_register on
  Error* (*device_memory_allocate)(DeviceMemoryAllocateArgs*);
  Error* (*device_memory_free)(DeviceMemoryFreeArgs*);
  const void* not_used_3[6];                            // from thread_pool_schedule on
  Error* (*device_ordinal_get)(DeviceOrdinalGetArgs*);  // from jaxlib 0.6 on
};

enum class DataType : int {
  kInt32 = 4,
  kInt64 = 5,
  kFloat16 = 10,
  kFloat32 = 11,
  kFloat64 = 12,
  kBFloat16 = 16,
};
struct Buffer {
  std::size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};
struct ByteSpan {
  const char* data;
  std::size_t size;
};
struct Scalar {
  DataType dtype;
  void* value;
};
enum class ArgumentType : int { kBuffer = 1 };  // of results as well
enum class AttributeType : int { kScalar = 3, kString = 4 };

struct Buffers {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  ArgumentType* types;
  Buffer** buffers;  // that are of type kBuffer
};
struct Attributes {  // sorted by name
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  AttributeType* types;
  ByteSpan** names;
  void** values;  // of a Scalar or, for strings, of a ByteSpan
};

enum class Stage : int { kInstantiate, kPrepare, kInitialize, kExecute };
struct CallFrame {
  std::size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  Stage stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
  void* future;  // out
};

// Null: all went well.
using Handler = Error*(CallFrame*);

}  // namespace adamax::xla

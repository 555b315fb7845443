// Python objects as memory: what a buffer is, the one function that imports it, and its checks.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>

#include "adamax/adamax.hpp"
#include "bindings/label.hpp"
#include "bindings/layout.hpp"
#include "bindings/leases.hpp"
#include "core/backend.hpp"

namespace adamax::bindings {

struct Buffer {
  char* data;
  DType dtype;
  std::int64_t size;  // elements
  int device = kHost;
  std::uintptr_t stream = 0;         // on which it is in use, on a device
  bool has_unknown_streams = false;  // and perhaps on others
  Layout layout;

  std::size_t bytes() const { return size * itemsize(dtype); }
  std::span<const char> memory() const { return {data, bytes()}; }
};

enum class Access { kRead, kWrite };

// Imports a NumPy array, a DLPack exporter, or an object with a CUDA array interface or the buffer
// protocol. Throws TypeError (no memory, or a dtype that is not known), BufferError (read-only,
// closed, freed or deleted), ValueError (another kind of device, strides that are no whole
// elements, a tensor without plain memory) or RuntimeError (a CUDA device on which no kernel runs).
//
// A negated view of torch, whose memory holds the opposite sign, is refused. To ask for that is the
// dearest part, and left out where more than one element begins at `known`: an object that was
// asked before could be negated there by torch._neg_view alone, which is private.
void import_buffer(py::handle object, const Label& label, Access access, Leases& leases,
                   Buffer& buffer, const void* known = nullptr);
// The same for state, which may also be kept as integers of 8 or 16 bits.
void import_state(py::handle object, const Label& label, Access access, Leases& leases,
                  Buffer& buffer, const void* known = nullptr);
// The same for memory whose elements are never negative, so that a negated view shows by itself.
void import_counts(py::handle object, const Label& label, Leases& leases, Buffer& buffer);

// Whether autograd counts the writes to an object, as it does for torch tensors.
bool has_version(py::handle object);
// Tells autograd that such objects among these were written, as torch's own operations do.
void note_written(std::span<const py::handle> objects);

// Throws ValueError unless both buffers are in host memory, or on one device.
void require_same_device(const Buffer& buffer, const Label& label, const Buffer& expected,
                         const Label& expected_label);
// Throws ValueError unless `buffer` has the device, element count and layout of `expected`.
void require_same_layout(const Buffer& buffer, const Label& label, const Buffer& expected,
                         const Label& expected_label);
// Throws ValueError unless the buffer covers one gapless stretch of memory.
void require_dense(const Buffer& buffer, const Label& label);
// Throws TypeError, naming both types, unless there is a storage with both.
void require_pair(const Buffer& param, const Label& param_label, const Buffer& grad,
                  const Label& grad_label);
// Whether elements are those of bfloat16, perhaps under the name of an integer.
inline bool holds_bfloat16(const Buffer& buffer) {
  return buffer.dtype == DType::kBFloat16 || buffer.dtype == DType::kUInt16;
}
// The format of the state of `param`, by its first moment; throws TypeError if it is none.
StateFormat state_format(const Buffer& momentum, const Label& label, const Buffer& param);
// Throw TypeError or ValueError unless the array is what `param` keeps in a format: an average or
// an accumulator, its norm, the scales of that, and what its weights do not hold.
void require_computed(const Buffer& buffer, const Label& label, const Buffer& param);
void require_norm(const Buffer& buffer, const Label& label, const Buffer& param,
                  StateFormat format);
void require_norm_scale(const Buffer& buffer, const Label& label, const Buffer& param,
                        StateFormat format);
void require_remainder(const Buffer& buffer, const Label& label, const Buffer& param);

}  // namespace adamax::bindings

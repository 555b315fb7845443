// Python objects as memory: what a buffer is, and the one function that imports it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "adamax/adamax.hpp"

struct DLManagedTensor;
struct DLManagedTensorVersioned;

namespace adamax::bindings {

namespace py = pybind11;

// How an error message names an argument; the text is made only when there is an error.
struct Label {
  std::string_view role;                  // "grads", "param", ...
  py::ssize_t index = -1;                 // position in a list, or -1
  const std::string* variable = nullptr;  // name of the variable that it belongs to

  std::string text() const;
};

// Shape and strides in elements. Two layouts are equal if they are apart from axes of length 1.
struct Layout {
  static constexpr int kMaxAxes = 64;
  int axes = 0;
  std::int64_t shape[kMaxAxes];
  std::int64_t strides[kMaxAxes];

  Layout() {}  // leaves the arrays as they are: a layout is made for every gradient of every step
  Layout(const Layout& other) { *this = other; }
  Layout& operator=(const Layout& other);
  bool operator==(const Layout& other) const;
  bool is_dense() const;
  std::string text() const;
};

constexpr int kHost = -1;  // in place of the number of a CUDA device

struct Buffer {
  char* data;
  DType dtype;
  std::int64_t size;  // elements
  int device = kHost;
  std::uintptr_t stream = 0;  // on which it is in use, on a device
  Layout layout;

  std::size_t bytes() const { return size * itemsize(dtype); }
};

// Holds what the buffer protocol and DLPack lent until it is destroyed, with the GIL held.
class Leases {
 public:
  Leases() = default;
  Leases(const Leases&) = delete;
  Leases& operator=(const Leases&) = delete;
  ~Leases();
  void keep(std::unique_ptr<Py_buffer> view) { views_.push_back(std::move(view)); }
  void keep(DLManagedTensor* tensor) { tensors_.push_back(tensor); }
  // Whether a device must have finished before the end of a lease: its owner may then reuse the
  // memory, and knows nothing of the stream.
  bool needs_synchronization = false;
  void keep(DLManagedTensorVersioned* tensor) { versioned_tensors_.push_back(tensor); }

 private:
  std::vector<std::unique_ptr<Py_buffer>> views_;
  std::vector<DLManagedTensor*> tensors_;
  std::vector<DLManagedTensorVersioned*> versioned_tensors_;
};

enum class Access { kRead, kWrite };

// Imports a NumPy array, a DLPack exporter, or an object with a CUDA array interface or the buffer
// protocol. Throws TypeError (no memory, or a dtype that is not known), BufferError (read-only,
// closed or freed), ValueError (another kind of device, strides that are no whole elements) or
// RuntimeError (a CUDA device on which no kernel runs).
void import_buffer(py::handle object, const Label& label, Access access, Leases& leases,
                   Buffer& buffer);

// What importers of single protocols share.
DType dtype_of_typestr(const std::string& typestr, const Label& label);
// `strides` may be null, for row-major memory. `unit` is the number of strides in an element: 1, or
// the size of an element for strides in bytes.
void set_layout(Buffer& buffer, const Label& label, int axes, const std::int64_t* shape,
                const std::int64_t* strides, std::int64_t unit);
void set_layout_of_bytes(Buffer& buffer, const Label& label, int axes, const py::ssize_t* shape,
                         const py::ssize_t* strides);
[[noreturn]] void throw_dtype(const Label& label, const std::string& received);
[[noreturn]] void throw_read_only(const Label& label, const char* why);

// Throws ValueError unless both buffers are in host memory, or on one device.
void require_same_device(const Buffer& buffer, const Label& label, const Buffer& expected,
                         const Label& expected_label);
// Throws ValueError unless `buffer` has the device, element count and layout of `expected`.
void require_same_layout(const Buffer& buffer, const Label& label, const Buffer& expected,
                         const Label& expected_label);
// Throws ValueError unless the buffer covers one gapless stretch of memory.
void require_dense(const Buffer& buffer, const Label& label);
// Throws TypeError, naming both types, unless the pair is supported.
void require_pair(DType param, DType grad, const Label& param_label, const Label& grad_label);
// Throws TypeError unless the dtype is the one in which `param` is computed.
void require_state_dtype(const Buffer& buffer, const Label& label, DType param);

}  // namespace adamax::bindings

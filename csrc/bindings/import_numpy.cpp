// Imports NumPy's arrays, by their C struct.
#include <pybind11/numpy.h>

#include <atomic>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "bindings/importers.hpp"

namespace adamax::bindings {
namespace {

std::optional<DType> numpy_dtype(const py::dtype& dtype) {
  constexpr int kHalf = 23;  // NPY_HALF
  const char order = dtype.byteorder();
  if (order == '=' || order == '|') {
    if (dtype.num() == py::detail::npy_api::NPY_FLOAT_) return DType::kFloat32;
    if (dtype.num() == py::detail::npy_api::NPY_DOUBLE_) return DType::kFloat64;
    if (dtype.num() == kHalf) return DType::kFloat16;
    if (dtype.num() == py::detail::npy_api::NPY_BYTE_) return DType::kInt8;
    if (dtype.num() == py::detail::npy_api::NPY_UBYTE_) return DType::kUInt8;
    if (dtype.num() == py::detail::npy_api::NPY_SHORT_) return DType::kInt16;
    if (dtype.num() == py::detail::npy_api::NPY_USHORT_) return DType::kUInt16;
    // The bfloat16 that ml_dtypes registers; a float64 typed "long double" is left out on purpose.
    if (dtype.itemsize() == 2 && py::cast<std::string>(dtype.attr("name")) == "bfloat16") {
      return DType::kBFloat16;
    }
  }
  return std::nullopt;
}

DType numpy_dtype_of(py::handle array, const Label& label) {
  // The descriptors seen so far, with a reference each; there is one object for a native type. What
  // is in it stays where it is.
  using Known = std::unordered_map<PyObject*, DType>;
  static auto* const known = new Known();
  static std::mutex known_mutex;
  static std::atomic<const Known::value_type*> last{nullptr};
  PyObject* const descriptor = py::detail::array_proxy(array.ptr())->descr;
  const Known::value_type* const found = last.load(std::memory_order_acquire);
  if (found != nullptr && found->first == descriptor) return found->second;
  {
    const std::lock_guard lock(known_mutex);
    const auto at = known->find(descriptor);
    if (at != known->end()) {
      last.store(&*at, std::memory_order_release);
      return at->second;
    }
  }
  const auto dtype = py::reinterpret_borrow<py::dtype>(descriptor);
  const std::optional<DType> result = numpy_dtype(dtype);
  if (!result) throw_dtype(label, py::str(py::handle(dtype)));
  const std::lock_guard lock(known_mutex);
  if (known->size() < 16 && known->emplace(descriptor, *result).second) Py_INCREF(descriptor);
  return *result;
}

}  // namespace

void import_numpy(py::handle object, const Label& label, Access access, Buffer& buffer) {
  const auto* array = py::detail::array_proxy(object.ptr());
  if (access == Access::kWrite && !(array->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_)) {
    throw_read_only(label, "");
  }
  buffer.dtype = numpy_dtype_of(object, label);
  buffer.data = array->data;
  buffer.device = kHost;
  // Without the strides there is nothing to divide.
  const bool is_row_major = (array->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_) != 0;
  set_layout_of_bytes(buffer, label, array->nd, array->dimensions,
                      is_row_major ? nullptr : array->strides);
}

}  // namespace adamax::bindings

// Imports memory: NumPy arrays directly, DLPack by its C table or its method, CUDA arrays, then the
// buffer protocol.
#include "bindings/buffer.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <unordered_map>

#include "bindings/dlpack.hpp"
#include "bindings/gpu.hpp"

namespace adamax::bindings {

void throw_dtype(const Label& label, const std::string& received) {
  throw py::type_error(label.text() + " has dtype " + received +
                       "; expected float32, float64, float16 or bfloat16");
}

namespace {

// ---- What a type offers -------------------------------------------------------------------------

enum class Protocol {
  kNumPy,
  kExchangeTable,
  kDLPack,
  kCudaArrayInterface,
  kBufferProtocol,
  kNone
};

struct TypeInfo {
  bool has_sign_mark = false;  // its arrays can be negated views, which DLPack does not tell
  Protocol protocol = Protocol::kNone;
  const DLPackExchangeAPI* table = nullptr;
  bool is_immutable =
      false;  // its arrays claim to be writable, or share memory, and must not change
};

TypeInfo inspect_type(py::handle object, py::handle type) {
  TypeInfo info;
  const auto module = py::cast<std::string>(py::str(py::getattr(type, "__module__", py::str(""))));
  const std::string library = module.substr(0, module.find('.'));
  info.is_immutable = library == "jax" || library == "jaxlib" || library == "tensorflow";
  info.table = exchange_table(type);
  info.has_sign_mark = py::hasattr(type, "is_neg");
  if (py::isinstance<py::array>(object)) {
    // The data of a masked array without its mask would be another array.
    if (!py::hasattr(type, "mask")) info.protocol = Protocol::kNumPy;
  } else if (info.table != nullptr) {
    info.protocol = Protocol::kExchangeTable;
  } else if (py::hasattr(type, "__dlpack__") && py::hasattr(type, "__dlpack_device__")) {
    info.protocol = Protocol::kDLPack;
  } else if (py::hasattr(type, "__cuda_array_interface__")) {
    info.protocol = Protocol::kCudaArrayInterface;
  } else if (PyObject_CheckBuffer(object.ptr())) {
    info.protocol = Protocol::kBufferProtocol;
  }
  return info;
}

const TypeInfo& type_info(py::handle object) {
  // Holds a reference to every type in it, so that no address is used for another type.
  static auto* const known = new std::unordered_map<PyTypeObject*, TypeInfo>();
  PyTypeObject* const type = Py_TYPE(object.ptr());
  // Buffers of one step are mostly of one type.
  static PyTypeObject* last_type = nullptr;
  static const TypeInfo* last_info = nullptr;
  if (type == last_type) return *last_info;
  auto found = known->find(type);
  if (found == known->end()) {
    const TypeInfo info = inspect_type(object, reinterpret_cast<PyObject*>(type));
    Py_INCREF(type);
    found = known->emplace(type, info).first;
  }
  last_type = type;
  last_info = &found->second;
  return *last_info;
}

// ---- NumPy --------------------------------------------------------------------------------------

std::optional<DType> numpy_dtype(const py::dtype& dtype) {
  constexpr int kHalf = 23;  // NPY_HALF
  const char order = dtype.byteorder();
  if (order == '=' || order == '|') {
    if (dtype.num() == py::detail::npy_api::NPY_FLOAT_) return DType::kFloat32;
    if (dtype.num() == py::detail::npy_api::NPY_DOUBLE_) return DType::kFloat64;
    if (dtype.num() == kHalf) return DType::kFloat16;
    // The bfloat16 that ml_dtypes registers; a float64 typed "long double" is left out on purpose.
    if (dtype.itemsize() == 2 && py::cast<std::string>(dtype.attr("name")) == "bfloat16") {
      return DType::kBFloat16;
    }
  }
  return std::nullopt;
}

DType numpy_dtype_of(py::handle array, const Label& label) {
  // The descriptors seen so far; there is one object each for the native types.
  static auto* const known = new std::unordered_map<PyObject*, DType>();
  static std::pair<PyObject*, DType> last{nullptr, DType::kFloat32};
  PyObject* const descriptor = py::detail::array_proxy(array.ptr())->descr;
  if (descriptor == last.first) return last.second;
  const auto found = known->find(descriptor);
  if (found != known->end()) return (last = *found).second;
  const auto dtype = py::reinterpret_borrow<py::dtype>(descriptor);
  const std::optional<DType> result = numpy_dtype(dtype);
  if (!result) throw_dtype(label, py::str(dtype));
  if (known->size() < 16) {
    Py_INCREF(descriptor);
    known->emplace(descriptor, *result);
  }
  return *result;
}

}  // namespace

void set_layout(Buffer& buffer, const Label& label, int axes, const std::int64_t* shape,
                const std::int64_t* strides, std::int64_t unit) {
  if (axes > Layout::kMaxAxes) {
    throw py::value_error(label.text() + " has " + std::to_string(axes) +
                          " axes; expected at most " + std::to_string(Layout::kMaxAxes));
  }
  buffer.size = 1;
  for (int i = 0; i < axes; ++i) buffer.size *= shape[i];
  Layout& layout = buffer.layout;
  layout.axes = axes;
  std::copy_n(shape, axes, layout.shape);
  std::int64_t row_major = 1;
  for (int i = axes - 1; strides == nullptr && i >= 0; --i) {
    layout.strides[i] = row_major;
    row_major *= shape[i];
  }
  for (int i = 0; strides != nullptr && i < axes; ++i) {
    layout.strides[i] = strides[i] / unit;
    if (shape[i] > 1 && strides[i] % unit != 0) {
      throw py::value_error(label.text() + " has a stride of " + std::to_string(strides[i]) +
                            " bytes; expected whole elements of " + std::to_string(unit) +
                            " bytes");
    }
  }
  if (buffer.size == 0) std::fill_n(layout.strides, axes, 0);  // they mean nothing
}

void set_layout_of_bytes(Buffer& buffer, const Label& label, int axes, const py::ssize_t* shape,
                         const py::ssize_t* strides) {
  static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t));
  set_layout(buffer, label, axes, reinterpret_cast<const std::int64_t*>(shape),
             reinterpret_cast<const std::int64_t*>(strides),
             static_cast<std::int64_t>(itemsize(buffer.dtype)));
}

[[noreturn]] void throw_read_only(const Label& label, const char* why) {
  throw py::buffer_error(label.text() + " is read-only" + why +
                         "; expected memory that may be written");
}

DType dtype_of_typestr(const std::string& typestr, const Label& label) {
  const bool is_native = typestr[0] == '|' || typestr[0] == (PY_LITTLE_ENDIAN ? '<' : '>');
  const std::string kind = typestr.substr(1);
  if (is_native && kind == "f4") return DType::kFloat32;
  if (is_native && kind == "f8") return DType::kFloat64;
  if (is_native && kind == "f2") return DType::kFloat16;
  throw_dtype(label, "'" + typestr + "' (an array interface's typestr)");
}

namespace {

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

bool is_negated(py::handle tensor) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  // Without a bound method for each tensor, of which the garbage collector would keep count.
  const auto answer =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// ---- The buffer protocol ------------------------------------------------------------------------

std::optional<DType> format_dtype(const char* format) {
  if (format == nullptr) return std::nullopt;
  const bool is_native =
      *format == '@' || *format == '=' || *format == (PY_LITTLE_ENDIAN ? '<' : '>');
  if (is_native) ++format;
  if (std::strcmp(format, "f") == 0) return DType::kFloat32;
  if (std::strcmp(format, "d") == 0) return DType::kFloat64;
  if (std::strcmp(format, "e") == 0) return DType::kFloat16;
  return std::nullopt;
}

void import_view(py::handle object, const Label& label, Access access, Leases& leases,
                 Buffer& buffer) {
  auto view = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(object.ptr(), view.get(), PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    py::error_already_set error;
    py::raise_from(error, PyExc_BufferError,
                   (label.text() + " did not export its memory: it may be closed").c_str());
    throw py::error_already_set();
  }
  const Py_buffer& lent = *view;
  leases.keep(std::move(view));
  if (access == Access::kWrite && lent.readonly) throw_read_only(label, "");
  const std::optional<DType> dtype = format_dtype(lent.format);
  if (!dtype) {
    throw_dtype(label, "'" + std::string(lent.format == nullptr ? "B" : lent.format) +
                           "' (a struct format)");
  }
  buffer.dtype = *dtype;
  buffer.data = static_cast<char*>(lent.buf);
  buffer.device = kHost;
  set_layout_of_bytes(buffer, label, lent.ndim, lent.shape, lent.strides);
}

}  // namespace

void import_buffer(py::handle object, const Label& label, Access access, Leases& leases,
                   Buffer& buffer) {
  const TypeInfo& info = type_info(object);
  if (access == Access::kWrite && info.is_immutable) {
    throw_read_only(label, " (arrays of its library are immutable)");
  }
  if (info.has_sign_mark && is_negated(object)) {
    throw py::value_error(label.text() +
                          " is a negated view, whose memory holds the opposite sign; expected "
                          "plain memory, such as its resolve_neg()");
  }
  switch (info.protocol) {
    case Protocol::kNumPy:
      return import_numpy(object, label, access, buffer);
    case Protocol::kExchangeTable:
      return import_by_table(object, label, *info.table, buffer);
    case Protocol::kDLPack:
      return import_dlpack(object, label, access, leases, buffer);
    case Protocol::kCudaArrayInterface:
      place_on_device(buffer, label, 0, 0);  // before the library does any work
      return import_cuda_array(object.attr("__cuda_array_interface__"), label, access, buffer);
    case Protocol::kBufferProtocol:
      return import_view(object, label, access, leases, buffer);
    case Protocol::kNone:
      break;
  }
  throw py::type_error(label.text() + " is a " + std::string(Py_TYPE(object.ptr())->tp_name) +
                       "; expected an object that exports memory (a NumPy array, DLPack, a CUDA "
                       "array, or the buffer protocol)");
}

}  // namespace adamax::bindings

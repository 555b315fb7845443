// What the importers of single protocols share: layouts and refusals.
#include "bindings/importers.hpp"

#include <algorithm>

namespace adamax::bindings {

void set_layout(Buffer& buffer, const Label& label, int axes, const std::int64_t* shape,
                const std::int64_t* strides, std::int64_t unit) {
  if (axes < 0 || axes > Layout::kMaxAxes) {
    throw py::value_error(label.text() + " has " + std::to_string(axes) + " axes; expected 0 to " +
                          std::to_string(Layout::kMaxAxes));
  }
  if (shape == nullptr && axes > 0) {
    throw py::value_error(label.text() + " has " + std::to_string(axes) +
                          " axes and a null pointer as its shape; expected their lengths");
  }
  buffer.size = 1;
  bool is_valid = true;
  for (int i = 0; i < axes; ++i) {
    is_valid =
        shape[i] >= 0 && !__builtin_mul_overflow(buffer.size, shape[i], &buffer.size) && is_valid;
  }
  std::int64_t bytes;
  const auto of_one = static_cast<std::int64_t>(itemsize(buffer.dtype));
  if (!is_valid || __builtin_mul_overflow(buffer.size, of_one, &bytes)) {
    throw py::value_error(label.text() +
                          " has a shape that no memory has; expected axes >= 0 with fewer than "
                          "2^63 bytes in all");
  }
  Layout& layout = buffer.layout;
  layout.axes = axes;
  std::copy_n(shape, axes, layout.shape);
  std::int64_t row_major = 1;
  for (int i = axes - 1; strides == nullptr && buffer.size > 0 && i >= 0; --i) {
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

void throw_dtype(const Label& label, const std::string& received) {
  throw py::type_error(label.text() + " has dtype " + received +
                       "; expected float32, float64, float16 or bfloat16");
}

void throw_read_only(const Label& label, const char* why) {
  throw py::buffer_error(label.text() + " is read-only" + why +
                         "; expected memory that may be written");
}

namespace {

// What kind of array gives no memory, and what would; empty if that cannot be seen.
std::string kind_without_memory(py::handle object) {
  if (py::hasattr(object, "to_local")) {
    return ", spread over devices; expected the memory of this one, its to_local()";
  }
  if (py::hasattr(object, "get_mask")) {
    return " with a mask; expected plain memory, such as its to_tensor()";
  }
  const auto layout = py::cast<std::string>(py::str(py::getattr(object, "layout", py::none())));
  if (layout.find("sparse") != std::string::npos) {
    return " with a sparse layout, " + layout + "; expected dense memory, such as its to_dense()";
  }
  if (layout.starts_with("torch.") && layout != "torch.strided") {
    return " with the layout " + layout + "; expected torch.strided";
  }
  if (py::bool_(py::getattr(object, "is_meta", py::bool_(false)))) {
    return " on the meta device, which has no memory; expected a tensor of a real device";
  }
  return "";
}

}  // namespace

void throw_no_memory(py::handle object, const Label& label, py::error_already_set* cause) {
  std::string kind, why;
  try {
    kind = kind_without_memory(object);
    if (cause != nullptr) why = " (" + py::str(cause->value()).cast<std::string>() + ")";
  } catch (py::error_already_set&) {  // an object so broken that it cannot even be asked
  }
  const std::string text = label.text() + " is a " + Py_TYPE(object.ptr())->tp_name +
                           (kind.empty() ? " that did not export its memory: it may be closed, "
                                           "freed or deleted, or was never allocated" +
                                               why
                                         : kind);
  PyObject* const type = kind.empty() ? PyExc_BufferError : PyExc_ValueError;
  if (cause != nullptr) {
    py::raise_from(*cause, type, text.c_str());
  } else {
    PyErr_SetString(type, text.c_str());
  }
  throw py::error_already_set();
}

}  // namespace adamax::bindings

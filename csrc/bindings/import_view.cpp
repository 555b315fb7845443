// Imports memory by the buffer protocol.
#include <cstring>
#include <optional>

#include "bindings/importers.hpp"

namespace adamax::bindings {
namespace {

std::optional<DType> format_dtype(const char* format) {
  if (format == nullptr) return std::nullopt;
  const bool is_native =
      *format == '@' || *format == '=' || *format == (PY_LITTLE_ENDIAN ? '<' : '>');
  if (is_native) ++format;
  if (std::strcmp(format, "f") == 0) return DType::kFloat32;
  if (std::strcmp(format, "d") == 0) return DType::kFloat64;
  if (std::strcmp(format, "e") == 0) return DType::kFloat16;
  if (std::strcmp(format, "b") == 0) return DType::kInt8;
  if (std::strcmp(format, "B") == 0) return DType::kUInt8;
  if (std::strcmp(format, "h") == 0) return DType::kInt16;
  if (std::strcmp(format, "H") == 0) return DType::kUInt16;
  return std::nullopt;
}

}  // namespace

void import_view(py::handle object, const Label& label, Access access, Leases& leases,
                 Buffer& buffer) {
  auto view = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(object.ptr(), view.get(), PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    py::error_already_set error;
    throw_no_memory(object, label, &error);
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

}  // namespace adamax::bindings

// Imports memory by __cuda_array_interface__.
#include <pybind11/stl.h>

#include <vector>

#include "bindings/backend.hpp"
#include "bindings/importers.hpp"

namespace adamax::bindings {
namespace {

DType dtype_of_typestr(const std::string& typestr, const Label& label) {
  const bool is_native = typestr[0] == '|' || typestr[0] == (PY_LITTLE_ENDIAN ? '<' : '>');
  const std::string kind = typestr.substr(1);
  if (is_native && kind == "f4") return DType::kFloat32;
  if (is_native && kind == "f8") return DType::kFloat64;
  if (is_native && kind == "f2") return DType::kFloat16;
  throw_dtype(label, "'" + typestr + "' (an array interface's typestr)");
}

void read_interface(const py::dict& interface, const Label& label, Access access, Buffer& buffer) {
  const auto item = [&](const char* key) {
    return interface.contains(key) ? py::object(interface[key]) : py::object(py::none());
  };
  if (!item("mask").is_none()) {
    throw py::value_error(label.text() + " has a mask; expected plain memory");
  }
  const auto [address, is_read_only] =
      py::cast<std::pair<std::uintptr_t, bool>>(py::tuple(interface["data"]));
  if (access == Access::kWrite && is_read_only) throw_read_only(label, "");
  buffer.dtype = dtype_of_typestr(py::cast<std::string>(interface["typestr"]), label);
  buffer.data = reinterpret_cast<char*>(address);
  const auto shape = py::cast<std::vector<py::ssize_t>>(interface["shape"]);
  const py::object strides = item("strides");
  const auto steps =
      strides.is_none() ? std::vector<py::ssize_t>() : py::cast<std::vector<py::ssize_t>>(strides);
  set_layout_of_bytes(buffer, label, static_cast<int>(shape.size()), shape.data(),
                      strides.is_none() ? nullptr : steps.data());
  if (address == 0 && buffer.size > 0) {
    throw py::buffer_error(label.text() + " has no memory: it was freed or never allocated");
  }
  // Without a stream in it the interface promises that the memory may be used at once.
  const py::object stream = item("stream");
  place_on_device(buffer, label, cuda_device_of(buffer.data, label),
                  stream.is_none() ? 0 : py::cast<std::uintptr_t>(stream));
}

}  // namespace

void import_cuda_array(const py::dict& interface, const Label& label, Access access,
                       Buffer& buffer) {
  const auto refuse = [&](const char* why) {
    throw py::buffer_error(label.text() + " has a __cuda_array_interface__ that is malformed (" +
                           why + "); expected version 3 of NVIDIA's");
  };
  try {
    read_interface(interface, label, access, buffer);
  } catch (const py::cast_error& error) {
    refuse(error.what());
  } catch (const std::out_of_range& error) {
    refuse(error.what());
  } catch (const py::error_already_set& error) {
    refuse(error.what());
  }
}

}  // namespace adamax::bindings

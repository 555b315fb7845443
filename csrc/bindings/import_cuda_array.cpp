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
  if (is_native && kind == "i1") return DType::kInt8;
  if (is_native && kind == "u1") return DType::kUInt8;
  if (is_native && kind == "i2") return DType::kInt16;
  if (is_native && kind == "u2") return DType::kUInt16;
  throw_dtype(label, "'" + typestr + "' (an array interface's typestr)");
}

// From version 3 on an interface has an entry for a stream.
bool knows_streams(const py::dict& interface) {
  if (!interface.contains("version")) return false;
  const py::object version = interface["version"];
  return py::isinstance<py::int_>(version) && version >= py::int_(3);
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
  if (!strides.is_none() && steps.size() != shape.size()) {
    throw std::out_of_range("strides do not fit shape");
  }
  set_layout_of_bytes(buffer, label, static_cast<int>(shape.size()), shape.data(),
                      strides.is_none() ? nullptr : steps.data());
  if (address == 0 && buffer.size > 0) {
    throw py::buffer_error(label.text() + " has no memory: it was freed or never allocated");
  }
  place_on_device(buffer, label, cuda_device_of(buffer.data, label),
                  tells_stream(interface) ? py::cast<std::uintptr_t>(interface["stream"]) : 0);
  // A stream of None is a promise that nothing is pending. No entry, or a version that knows none,
  // is no promise: so torch and JAX say nothing of the streams that they work on.
  buffer.has_unknown_streams = !(knows_streams(interface) && interface.contains("stream"));
}

}  // namespace

bool tells_stream(py::handle interface) {
  if (!py::isinstance<py::dict>(interface)) return false;
  const auto dict = py::reinterpret_borrow<py::dict>(interface);
  return knows_streams(dict) && dict.contains("stream") && !dict["stream"].is_none();
}

void import_cuda_array(py::handle interface, const Label& label, Access access, Buffer& buffer) {
  const auto refuse = [&](const char* why) {
    throw py::buffer_error(label.text() + " has a __cuda_array_interface__ that is malformed (" +
                           why + "); expected version 3 of NVIDIA's");
  };
  try {
    read_interface(py::cast<py::dict>(interface), label, access, buffer);
  } catch (const py::cast_error& error) {
    refuse(error.what());
  } catch (const std::out_of_range& error) {
    refuse(error.what());
  } catch (const py::error_already_set& error) {
    refuse(error.what());
  }
}

}  // namespace adamax::bindings

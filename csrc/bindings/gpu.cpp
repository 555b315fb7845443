// Memory on a GPU: the module _cuda, loaded on first use, and __cuda_array_interface__.
#include "bindings/gpu.hpp"

#include <pybind11/stl.h>

#include <stdexcept>

namespace adamax::bindings {

const cuda::Api& cuda_api() {
  static const cuda::Api* api = nullptr;
  if (api != nullptr) return *api;
  try {
    const py::module_ module = py::module_::import("adamax_ext._cuda");
    api = py::reinterpret_borrow<py::capsule>(module.attr("api")).get_pointer<cuda::Api>();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ModuleNotFoundError)) throw;
    throw std::runtime_error(
        "this build of adamax_ext has no CUDA kernels; expected one that was built with nvcc: pip "
        "install with -Ccmake.define.ADAMAX_EXT_CUDA=ON");
  }
  return *api;
}

// Calls `ask`; its errors get the name of the buffer.
template <class Ask>
auto with_label(const Label& label, const Ask& ask) {
  try {
    return ask();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(label.text() + " is on a CUDA device: " + error.what());
  }
}

void place_on_device(Buffer& buffer, const Label& label, int device, std::uintptr_t stream) {
  with_label(label, [device] { cuda_api().require_usable(device); });
  buffer.device = device;
  buffer.stream = stream == 0 ? cuda::kLegacyDefaultStream : stream;
}

void import_cuda_array(const py::dict& interface, const Label& label, Access access,
                       Buffer& buffer) {
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
  const int device = with_label(label, [&buffer] { return cuda_api().device_of(buffer.data); });
  place_on_device(buffer, label, device, stream.is_none() ? 0 : py::cast<std::uintptr_t>(stream));
}

}  // namespace adamax::bindings

// Imports memory by DLPack: a type's C exchange table, or the methods of an object.
#include <dlpack/dlpack.h>

#include <iterator>

#include "adamax/cuda.hpp"
#include "bindings/backend.hpp"
#include "bindings/importers.hpp"

namespace adamax::bindings {

const DLPackExchangeAPI* exchange_table(py::handle type) {
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* header = static_cast<const DLPackExchangeAPIHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION) {
    header = header->prev_api;
  }
  const auto* table = reinterpret_cast<const DLPackExchangeAPI*>(header);
  return table != nullptr && table->dltensor_from_py_object_no_sync != nullptr ? table : nullptr;
}

namespace {

bool is_host(DLDevice device) {
  return device.device_type == kDLCPU || device.device_type == kDLCUDAHost ||
         device.device_type == kDLROCMHost;
}

// Throws ValueError unless the device is a host or of CUDA. A number below 0 is none of CUDA's, and
// kHost is one.
void require_known_device(const Label& label, DLDevice device) {
  const bool is_cuda = device.device_type == kDLCUDA || device.device_type == kDLCUDAManaged;
  if (is_host(device) || (is_cuda && device.device_id >= 0)) return;
  throw py::value_error(
      label.text() + " is on a device (DLPack type " + std::to_string(device.device_type) +
      ", number " + std::to_string(device.device_id) + "); expected host memory or a CUDA device");
}

std::string dlpack_name(DLDataType type) {
  constexpr const char* kNames[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  std::string name = type.code < std::size(kNames)
                         ? kNames[type.code]
                         : "DLPack code " + std::to_string(type.code) + " of ";
  name += std::to_string(type.bits);
  return type.lanes == 1 ? name : name + " in " + std::to_string(type.lanes) + " lanes";
}

// `stream` is where the memory is in use, on a CUDA device.
void import_dl_tensor(py::handle object, const DLTensor& tensor, const Label& label,
                      std::uintptr_t stream, Buffer& buffer) {
  require_known_device(label, tensor.device);
  if (is_host(tensor.device)) {
    buffer.device = kHost;
  } else {
    place_on_device(buffer, label, tensor.device.device_id, stream);
  }

  const DLDataType type = tensor.dtype;
  const bool is_scalar = type.lanes == 1;
  if (is_scalar && type.code == kDLFloat && type.bits == 32) {
    buffer.dtype = DType::kFloat32;
  } else if (is_scalar && type.code == kDLFloat && type.bits == 64) {
    buffer.dtype = DType::kFloat64;
  } else if (is_scalar && type.code == kDLFloat && type.bits == 16) {
    buffer.dtype = DType::kFloat16;
  } else if (is_scalar && type.code == kDLBfloat && type.bits == 16) {
    buffer.dtype = DType::kBFloat16;
  } else if (is_scalar && type.code == kDLInt && type.bits == 8) {
    buffer.dtype = DType::kInt8;
  } else if (is_scalar && type.code == kDLUInt && type.bits == 8) {
    buffer.dtype = DType::kUInt8;
  } else if (is_scalar && type.code == kDLInt && type.bits == 16) {
    buffer.dtype = DType::kInt16;
  } else if (is_scalar && type.code == kDLUInt && type.bits == 16) {
    buffer.dtype = DType::kUInt16;
  } else {
    throw_dtype(label, dlpack_name(type));
  }
  auto* const data = static_cast<char*>(tensor.data);
  buffer.data = data == nullptr ? nullptr : data + tensor.byte_offset;
  set_layout(buffer, label, tensor.ndim, tensor.shape, tensor.strides, 1);
  if (tensor.data == nullptr && buffer.size > 0) throw_no_memory(object, label);
}

py::object call_dlpack(py::handle object, bool on_host) {
  // Work that the library still has queued would otherwise be read half done.
  if (py::hasattr(object, "block_until_ready")) object.attr("block_until_ready")();
  py::object exporter = py::reinterpret_borrow<py::object>(object);
  // torch exports a tensor that requires grad only through its data.
  if (py::bool_(py::getattr(object, "requires_grad", py::bool_(false)))) {
    exporter = object.attr("detach")();
  }
  const auto method = exporter.attr("__dlpack__");
  // A device's exporter makes the memory ready on the stream that it is told.
  py::dict arguments;
  if (!on_host) arguments["stream"] = cuda::kLegacyDefaultStream;
  try {
    return method(
        py::arg("max_version") = py::make_tuple(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION),
        py::arg("copy") = false, **arguments);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return method(**arguments);  // an exporter from before DLPack 1.0
  }
}

// Calls `ask`, which runs the code of the object's library; its errors name the buffer.
template <class Ask>
auto exported(py::handle object, const Label& label, const Ask& ask) {
  try {
    return ask();
  } catch (py::error_already_set& error) {
    throw_no_memory(object, label, &error);
  } catch (const py::cast_error&) {
    throw py::buffer_error(label.text() + " is a " + Py_TYPE(object.ptr())->tp_name +
                           " whose __dlpack_device__() is no pair of numbers");
  }
}

}  // namespace

void import_dlpack(py::handle object, const Label& label, Access access, Leases& leases,
                   Buffer& buffer) {
  const auto device = exported(object, label, [&] {
    return py::cast<std::pair<int, int>>(py::tuple(object.attr("__dlpack_device__")()));
  });
  const DLDevice place{static_cast<DLDeviceType>(device.first), device.second};
  require_known_device(label, place);
  const bool on_host = is_host(place);
  if (!on_host) {
    place_on_device(buffer, label, place.device_id, 0);  // before the library does any work
    // Where CUDA's own interface tells the stream that the library works on, nobody has to wait.
    const py::object interface = py::getattr(object, "__cuda_array_interface__", py::none());
    if (tells_stream(interface)) return import_cuda_array(interface, label, access, buffer);
    leases.needs_synchronization = true;
  }
  const py::object capsule = exported(object, label, [&] { return call_dlpack(object, on_host); });
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* const managed = static_cast<DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    leases.keep(managed);
    if (managed->version.major != DLPACK_MAJOR_VERSION) {
      throw py::buffer_error(label.text() + " exports DLPack version " +
                             std::to_string(managed->version.major) + "; expected version 1");
    }
    if (access == Access::kWrite && (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0) {
      throw_read_only(label, "");
    }
    if (access == Access::kWrite && (managed->flags & DLPACK_FLAG_BITMASK_IS_COPIED) != 0) {
      throw py::buffer_error(label.text() + " exported a copy; expected its own memory");
    }
    import_dl_tensor(object, managed->dl_tensor, label, 0, buffer);
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    auto* const managed =
        static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    leases.keep(managed);
    import_dl_tensor(object, managed->dl_tensor, label, 0, buffer);
  } else {
    throw py::buffer_error(label.text() + " returned no DLPack capsule from __dlpack__()");
  }
}

void import_by_table(py::handle object, const Label& label, const DLPackExchangeAPI& table,
                     Buffer& buffer) {
  DLTensor tensor;
  if (table.dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
    py::error_already_set error;
    throw_no_memory(object, label, &error);
  }
  void* stream = nullptr;
  if (!is_host(tensor.device) && table.current_work_stream != nullptr &&
      table.current_work_stream(tensor.device.device_type, tensor.device.device_id, &stream) != 0) {
    py::error_already_set error;
    throw_no_memory(object, label, &error);
  }
  import_dl_tensor(object, tensor, label, reinterpret_cast<std::uintptr_t>(stream), buffer);
}

}  // namespace adamax::bindings

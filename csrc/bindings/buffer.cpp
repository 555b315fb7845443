// Imports memory: finds out once what a type offers, and takes the first of NumPy's struct, DLPack,
// CUDA's array interface and the buffer protocol.
#include "bindings/buffer.hpp"

#include <pybind11/numpy.h>

#include <atomic>
#include <mutex>
#include <string>
#include <unordered_map>

#include "bindings/backend.hpp"
#include "bindings/importers.hpp"

namespace adamax::bindings {
namespace {

constexpr const char* kImmutable = " (arrays of its library are immutable)";

enum class Protocol {
  kNumPy,
  kExchangeTable,
  kDLPack,
  kCudaArrayInterface,
  kBufferProtocol,
  kNone
};

struct TypeInfo {
  Protocol protocol = Protocol::kNone;
  const DLPackExchangeAPI* table = nullptr;
  bool is_immutable = false;   // its arrays claim to be writable, or share memory
  bool has_sign_mark = false;  // its arrays can be negated views, which DLPack does not tell
  PyObject* is_neg = nullptr;  // torch's method that tells, if it is not another one
  PyObject* increment_version = nullptr;  // torch's function for tensors that were written, or null
};

std::string library_of(py::handle type) {
  const auto module = py::cast<std::string>(py::str(py::getattr(type, "__module__", py::str(""))));
  return module.substr(0, module.find('.'));
}

// For a subclass of torch.Tensor; torch itself is not imported for it.
PyObject* torch_increment_version(py::handle type) {
  for (const py::handle base : py::tuple(type.attr("__mro__"))) {
    if (library_of(base) != "torch" || !py::hasattr(base, "_version")) continue;
    const py::dict modules = py::module_::import("sys").attr("modules");
    const py::object graph = modules.contains("torch.autograd.graph")
                                 ? py::object(modules["torch.autograd.graph"])
                                 : py::object(py::none());
    return py::getattr(graph, "increment_version", py::none()).release().ptr();
  }
  return nullptr;
}

TypeInfo inspect_type(py::handle object, py::handle type) {
  TypeInfo info;
  const std::string library = library_of(type);
  info.is_immutable = library == "jax" || library == "jaxlib" || library == "tensorflow";
  info.table = exchange_table(type);
  const py::object is_neg = py::getattr(type, "is_neg", py::none());
  info.has_sign_mark = !is_neg.is_none();
  // One that a class defines itself could hold the class, and its objects an optimizer.
  if (Py_IS_TYPE(is_neg.ptr(), &PyMethodDescr_Type)) info.is_neg = is_neg.inc_ref().ptr();
  info.increment_version = torch_increment_version(type);
  if (info.increment_version == Py_None) info.increment_version = nullptr;  // an old torch
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

// What is known of a type. It stays in memory when the type dies, because another thread may be
// looking at it; null in place of the type then tells that it is nobody's.
struct Known {
  std::atomic<PyTypeObject*> type;
  TypeInfo info;
};

class KnownTypes {
 public:
  const Known& of(py::handle object) {
    PyTypeObject* const type = Py_TYPE(object.ptr());
    {
      const std::lock_guard lock(mutex_);
      const auto found = known_.find(type);
      if (found != known_.end()) return *found->second;
    }
    const py::handle type_object = reinterpret_cast<PyObject*>(type);
    const TypeInfo info = inspect_type(object, type_object);  // runs Python
    const Known* known;
    {
      const std::lock_guard lock(mutex_);
      const auto [at, is_new] = known_.emplace(type, nullptr);
      if (!is_new) return *at->second;
      known = at->second = new Known{type, info};
    }
    // No reference to the type: its objects may hold an optimizer.
    py::weakref(type_object, py::cpp_function([this, type](py::handle reference) {
                  forget(type);
                  reference.dec_ref();
                }))
        .release();
    return *known;
  }

 private:
  void forget(PyTypeObject* type) {
    const std::lock_guard lock(mutex_);
    const auto found = known_.find(type);
    found->second->type = nullptr;
    known_.erase(found);
  }

  std::unordered_map<PyTypeObject*, Known*> known_;
  std::mutex mutex_;
};

const TypeInfo& type_info(py::handle object) {
  static auto* const types = new KnownTypes();
  // The buffers of one step are of a few types in turns, such as torch's Parameter and Tensor.
  static std::atomic<const Known*> last[16];
  PyTypeObject* const type = Py_TYPE(object.ptr());
  const auto address = reinterpret_cast<std::uintptr_t>(type);
  std::atomic<const Known*>& slot = last[(address >> 4 ^ address >> 10) % std::size(last)];
  const Known* known = slot.load(std::memory_order_acquire);
  if (known == nullptr || known->type.load(std::memory_order_relaxed) != type) {
    known = &types->of(object);
    slot.store(known, std::memory_order_release);
  }
  return known->info;
}

void require_plain_sign(const TypeInfo& info, py::handle object, const Label& label) {
  if (!info.has_sign_mark) return;
  PyObject* const argument = object.ptr();
  const auto answer = info.is_neg == nullptr
                          ? py::object(object.attr("is_neg")())
                          : py::reinterpret_steal<py::object>(
                                PyObject_Vectorcall(info.is_neg, &argument, 1, nullptr));
  if (!answer) throw py::error_already_set();
  if (answer.ptr() != Py_True) return;
  throw py::value_error(label.text() +
                        " is a negated view, whose memory holds the opposite sign; expected plain "
                        "memory, such as its resolve_neg()");
}

void import_memory(const TypeInfo& info, py::handle object, const Label& label, Access access,
                   Leases& leases, Buffer& buffer) {
  switch (info.protocol) {
    case Protocol::kNumPy:
      return import_numpy(object, label, access, buffer);
    case Protocol::kExchangeTable:
      return import_by_table(object, label, *info.table, buffer);
    case Protocol::kDLPack:
      return import_dlpack(object, label, access, leases, buffer);
    case Protocol::kCudaArrayInterface:
      place_on_device(buffer, label, 0, 0);  // before the library does any work
      return import_cuda_array(py::object(object.attr("__cuda_array_interface__")), label, access,
                               buffer);
    case Protocol::kBufferProtocol:
      return import_view(object, label, access, leases, buffer);
    case Protocol::kNone:
      break;
  }
  throw py::type_error(label.text() + " is a " + std::string(Py_TYPE(object.ptr())->tp_name) +
                       "; expected an object that exports memory (a NumPy array, DLPack, a CUDA "
                       "array, or the buffer protocol)");
}

}  // namespace

void import_state(py::handle object, const Label& label, Access access, Leases& leases,
                  Buffer& buffer, const void* known) {
  const TypeInfo& info = type_info(object);
  if (access == Access::kWrite && info.is_immutable) {
    throw_read_only(label, kImmutable);
  }
  if (known == nullptr) require_plain_sign(info, object, label);
  import_memory(info, object, label, access, leases, buffer);
  if (known != nullptr && (buffer.data != known || buffer.size <= 1)) {
    require_plain_sign(info, object, label);
  }
}

void import_buffer(py::handle object, const Label& label, Access access, Leases& leases,
                   Buffer& buffer, const void* known) {
  import_state(object, label, access, leases, buffer, known);
  if (static_cast<int>(buffer.dtype) >= kNumDTypes) {
    throw_dtype(label, std::string(dtype_name(buffer.dtype)));
  }
}

void import_counts(py::handle object, const Label& label, Leases& leases, Buffer& buffer) {
  const TypeInfo& info = type_info(object);
  if (info.is_immutable) throw_read_only(label, kImmutable);
  import_memory(info, object, label, Access::kWrite, leases, buffer);
}

bool has_version(py::handle object) { return type_info(object).increment_version != nullptr; }

void note_written(std::span<const py::handle> objects) {
  py::list tensors;
  py::handle increment_version;
  for (const py::handle object : objects) {
    const TypeInfo& info = type_info(object);
    if (info.increment_version == nullptr) continue;
    increment_version = info.increment_version;
    tensors.append(object);
  }
  if (!increment_version) return;
  try {
    increment_version(tensors);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_RuntimeError)) throw;
    for (const py::handle tensor : tensors) {  // those made for inference have no version
      if (!py::cast<bool>(tensor.attr("is_inference")())) increment_version(tensor);
    }
  }
}

}  // namespace adamax::bindings

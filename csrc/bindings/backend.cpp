// Where a call runs: the backend of a device, its scratch memory, and the streams of a call.
#include "bindings/backend.hpp"

#include <atomic>
#include <stdexcept>
#include <utility>

#include "adamax/cuda.hpp"
#include "cpu/run.hpp"

namespace adamax::bindings {
namespace {

const Backend& cuda_backend() {
  static std::atomic<const Backend*> known{nullptr};
  if (const Backend* const backend = known.load(std::memory_order_acquire)) return *backend;
  try {
    const py::module_ module = py::module_::import("adamax_ext._cuda");
    known = py::reinterpret_borrow<py::capsule>(module.attr("backend")).get_pointer<Backend>();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ModuleNotFoundError)) throw;
    throw std::runtime_error(
        "this build of adamax_ext has no CUDA kernels; expected one that was built with nvcc: pip "
        "install with -Ccmake.define.ADAMAX_EXT_CUDA=ON");
  }
  return *known.load();
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

}  // namespace

const Backend& backend_of(int device) { return device == kHost ? cpu::backend() : cuda_backend(); }

void place_on_device(Buffer& buffer, const Label& label, int device, std::uintptr_t stream) {
  with_label(label, [device] { backend_of(device).require_usable(device); });
  buffer.device = device;
  buffer.stream = stream == 0 ? cuda::kLegacyDefaultStream : stream;
}

int cuda_device_of(const void* memory, const Label& label) {
  return with_label(label, [memory] { return cuda_backend().device_of(memory); });
}

Outcome Runner::run(const Program& program, const Streams& streams, const Leases& leases) {
  const Backend& backend = backend_of(device_);
  const Queue queue = streams.queue(device_);
  const std::size_t bytes = backend.scratch_bytes(program);
  // On another stream than before, the old memory can still be in use.
  if (bytes > capacity_ || (queue.stream != stream_ && scratch_ != nullptr)) {
    backend.deallocate(device_, std::exchange(scratch_, nullptr));
    capacity_ = 0;
    scratch_ = backend.allocate(device_, bytes);
    capacity_ = bytes;
  }
  stream_ = queue.stream;
  const py::gil_scoped_release release;
  const auto finish_leases = [&] {
    if (leases.needs_synchronization) backend.synchronize(queue);
  };
  try {
    const Outcome outcome = backend.run(queue, scratch_, program);
    finish_leases();
    return outcome;
  } catch (...) {
    finish_leases();  // some of it can be queued already
    throw;
  }
}

}  // namespace adamax::bindings

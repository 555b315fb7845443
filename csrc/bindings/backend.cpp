// Where a call runs: the backend of a device, its workspace, and the streams of a call.
#include "bindings/backend.hpp"

#include <atomic>
#include <map>
#include <stdexcept>
#include <utility>

#include "adamax/cuda.hpp"
#include "bindings/without_gil.hpp"
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
  buffer.has_unknown_streams = false;
}

int cuda_device_of(const void* memory, const Label& label) {
  return with_label(label, [memory] { return cuda_backend().device_of(memory); });
}

Runner::~Runner() {
  const Backend& backend = backend_of(device_);
  backend.deallocate(device_, workspace_);
  for (const Workspace& workspace : outgrown_) backend.deallocate(device_, workspace);
}

void Runner::allocate(const Backend& backend, std::size_t bytes) {
  if (bytes <= workspace_.bytes) return;
  if (for_graphs_) {
    outgrown_.push_back(std::exchange(workspace_, {}));
  } else {
    backend.deallocate(device_, std::exchange(workspace_, {}));
  }
  workspace_ = backend.allocate(device_, bytes);
}

void Runner::prepare(const Program& largest, const Streams& streams) {
  const Backend& backend = backend_of(device_);
  Queue queue = streams.queue(device_);
  queue.after_all = true;
  const WithoutGil released;
  backend.synchronize(queue);
  allocate(backend, backend.scratch_bytes(largest));
}

void Runner::reserve(const Program& program, const Streams& streams) {
  const Backend& backend = backend_of(device_);
  const std::size_t bytes = backend.scratch_bytes(program);
  if (bytes <= workspace_.bytes) return;
  const Queue queue = streams.queue(device_);
  const WithoutGil released;
  backend.synchronize(queue);  // refuses a capture, which an allocation would break
  allocate(backend, bytes);
}

Outcome Runner::run(const Program& program, const Streams& streams, const Leases& leases) {
  reserve(program, streams);
  const Backend& backend = backend_of(device_);
  const Queue queue = streams.queue(device_);
  const WithoutGil released;
  try {
    Workspace workspace = workspace_;
    if (for_graphs_) workspace.last_use = nullptr;
    const Outcome outcome = backend.run(queue, workspace, program);
    // What later uses the memory on a stream that nobody named would not wait for this work.
    if (leases.needs_synchronization || queue.after_all) {
      backend.synchronize({device_, queue.stream});
    }
    return outcome;
  } catch (...) {
    try {  // some of it can be queued already
      backend.synchronize(queue);
    } catch (const std::runtime_error&) {
    }
    throw;
  }
}

Outcome run_once(int device, const Program& program, const Streams& streams, const Leases& leases) {
  thread_local std::map<int, Runner> runners;  // of earlier calls of this thread
  return runners.try_emplace(device, device).first->second.run(program, streams, leases);
}

}  // namespace adamax::bindings

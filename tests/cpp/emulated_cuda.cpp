// An emulated CUDA device: the kernels run thread by thread on the host, and a log tells what a GPU
// would have been asked. Linked with csrc/cuda/module.cpp it is a module _cuda for tests.
#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/backend.hpp"
#include "cuda/run.hpp"
#include "cuda/support.hpp"

namespace adamax::cuda {
namespace {

std::string the_log;
std::set<std::uintptr_t> capturing;                                   // streams
std::map<std::uintptr_t, std::vector<std::function<void()>>> graphs;  // what was captured of each
std::vector<void (*)()> pending;  // what the device has still to do, on any stream
std::uintptr_t device_1_begin = 0, device_1_end = 0;
std::uint64_t first_element = 0;  // of elementwise kernels: the chunks before are left out
Found the_machine{13000, 13000, 2, "", 0, 86};

void log(const std::string& line) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  the_log += line + "\n";
}

void finish_pending() {
  for (void (*const work)() : std::exchange(pending, {})) work();
}

class Device {
 public:
  explicit Device(const Queue& queue, bool is_repeatable = false) : queue_(queue) {
    if (!is_repeatable || !queue.others.empty() || queue.after_all) {
      require_no_capture(queue_.stream);
    }
    for (const std::uintptr_t other : queue_.others) require_no_capture(other);
    if (queue_.after_all) {
      log("synchronize device");
      finish_pending();
    }
    for (const std::uintptr_t other : queue_.others) log("wait for " + std::to_string(other));
  }
  void finish() {
    for (const std::uintptr_t other : queue_.others) log("hold up " + std::to_string(other));
  }

  // A last use is the stream on which it was.
  void wait_for(void* last_use) {
    expect_no_capture();
    const std::uintptr_t stream = *static_cast<std::uintptr_t*>(last_use);
    if (stream != 0 && stream != queue_.stream) {
      log("wait for the last use on " + std::to_string(stream));
    }
  }
  void note(void* last_use) {
    expect_no_capture();
    *static_cast<std::uintptr_t*>(last_use) = queue_.stream;
  }

  // A graph has a copy of the arguments, as CUDA's has.
  template <class Kernel>
  void launch(const Kernel& kernel) {
    log(std::string("launch ") + Kernel::kName + " on device " + std::to_string(queue_.device) +
        " stream " + std::to_string(queue_.stream));
    if (capturing.contains(queue_.stream)) {
      graphs[queue_.stream].push_back([kernel] { run(kernel); });
    } else {
      run(kernel);
    }
  }

  // Blocks and threads in reverse: nothing may depend on their order.
  template <class Kernel>
  static void run(const Kernel& kernel) {
    std::uint32_t first_block = 0;
    if constexpr (requires { Kernel::kChunk; }) {
      first_block = static_cast<std::uint32_t>(first_element / Kernel::kChunk);
    }
    for (std::uint32_t block = kernel.blocks(); block-- > first_block;) {
      if constexpr (requires { Kernel::kShared; }) {
        double shared[Kernel::kShared];
        for (int phase = 0; phase < kernel.phases(); ++phase) {
          for (int thread = Kernel::kThreads; thread-- > 0;) kernel({block, thread}, shared, phase);
        }
      } else if constexpr (requires { requires Kernel::kHasLargest; }) {
        std::vector<typename Kernel::Registers> registers(Kernel::kThreads);
        float largest[Kernel::kThreads / kWarp]{};
        for (int thread = Kernel::kThreads; thread-- > 0;) {
          float& of_warp = largest[thread / kWarp];
          of_warp = std::max(of_warp, kernel.first_half({block, thread}, registers[thread]));
        }
        for (int thread = Kernel::kThreads; thread-- > 0;) {
          kernel.second_half({block, thread}, registers[thread], largest[thread / kWarp]);
        }
      } else {
        for (int thread = Kernel::kThreads; thread-- > 0;) kernel({block, thread});
      }
    }
  }

  void upload(void* to, const void* from, std::size_t bytes) {
    expect_no_capture();
    log("upload");
    std::memcpy(to, from, bytes);
  }
  void clear(int* flag) {
    expect_no_capture();
    *flag = 0;
  }
  void request(const int* flag) {
    expect_no_capture();
    host_flag_ = *flag;
  }
  int awaited_flag() {
    log("synchronize");
    return host_flag_;
  }
  void copy(void* to, const void* from, std::size_t bytes) {
    std::memcpy(to, from, bytes);
    synchronize();
  }
  void synchronize() { log("synchronize"); }

  static void require_usable(int device) {
    Found found = the_machine;
    found.device = device;
    const std::string why = why_unusable(found, {75, 86, 120});
    if (!why.empty()) throw std::runtime_error(why);
  }
  static int device_of(const void* memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    return address >= device_1_begin && address < device_1_end ? 1 : 0;
  }
  // As large as was asked for, so that a checker of addresses sees what lies outside.
  static Workspace allocate(int, std::size_t bytes) {
    log("allocate");
    return {::operator new(bytes), bytes, new std::uintptr_t(0)};
  }
  static void deallocate(int, const Workspace& workspace) {
    if (workspace.memory == nullptr) return;
    log("deallocate");
    ::operator delete(workspace.memory);
    delete static_cast<std::uintptr_t*>(workspace.last_use);
  }

 private:
  static void require_no_capture(std::uintptr_t stream) {
    if (capturing.contains(stream)) throw std::runtime_error(kCaptureRefused);
  }
  // Of what a graph would do with this host's memory, or cannot do.
  void expect_no_capture() const {
    if (capturing.contains(queue_.stream)) throw std::logic_error("part of a graph");
  }

  const Queue queue_;
  int host_flag_ = -1;
};

// What a kernel did not write is NaN.
Outcome run(const Queue& queue, const Workspace& workspace, const Program& program) {
  static const Backend kDevice = make_backend<Device>();
  const auto forget = [memory = workspace.memory, bytes = workspace.bytes] {
    if (memory != nullptr) std::memset(memory, 0xff, bytes);
  };
  forget();
  const Outcome outcome = kDevice.run(queue, workspace, program);
  if (capturing.contains(queue.stream)) graphs[queue.stream].push_back(forget);
  return outcome;
}

}  // namespace

const Backend& backend() {
  static const Backend kBackend = [] {
    Backend backend = make_backend<Device>();
    backend.run = run;
    return backend;
  }();
  return kBackend;
}

}  // namespace adamax::cuda

// Controls for tests, called by ctypes.
extern "C" {
[[gnu::visibility("default")]] const char* emulated_log() { return adamax::cuda::the_log.c_str(); }
[[gnu::visibility("default")]] void emulated_clear_log() { adamax::cuda::the_log.clear(); }
[[gnu::visibility("default")]] void emulated_capture(std::uintptr_t stream, int on) {
  if (on != 0) {
    adamax::cuda::capturing.insert(stream);
  } else {
    adamax::cuda::capturing.erase(stream);
  }
}
[[gnu::visibility("default")]] void emulated_replay(std::uintptr_t stream) {
  for (const auto& work : adamax::cuda::graphs.at(stream)) work();
}
[[gnu::visibility("default")]] void emulated_forget_graphs() { adamax::cuda::graphs.clear(); }
[[gnu::visibility("default")]] void emulated_pending(void (*work)()) {
  adamax::cuda::pending.push_back(work);
}
[[gnu::visibility("default")]] void emulated_finish() { adamax::cuda::finish_pending(); }
[[gnu::visibility("default")]] void emulated_first_element(std::uint64_t element) {
  adamax::cuda::first_element = element;
}
[[gnu::visibility("default")]] void emulated_device_1(std::uintptr_t begin, std::uintptr_t end) {
  adamax::cuda::device_1_begin = begin;
  adamax::cuda::device_1_end = end;
}
[[gnu::visibility("default")]] void emulated_machine(int driver, int runtime, int devices,
                                                     int capability, const char* error) {
  adamax::cuda::the_machine = {driver, runtime, devices, error, 0, capability};
}
}

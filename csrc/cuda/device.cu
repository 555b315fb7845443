// The real device: launches, memory, events and errors of the CUDA runtime.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/backend.hpp"
#include "cuda/run.hpp"
#include "cuda/support.hpp"

namespace adamax::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call of anyone should not find it again
  throw std::runtime_error(std::string("CUDA failed to ") + what + ": " + cudaGetErrorName(error) +
                           " (" + cudaGetErrorString(error) + ")");
}

// The calling thread's device, and the one it had before at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "ask for the current device");
    if (before_ == device) return;
    check(cudaSetDevice(device), "select the device");
    changed_ = true;
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// For calls that a capture on any stream of the process would forbid, and that are no part of it.
class OutsideOfCaptures {
 public:
  OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideOfCaptures(const OutsideOfCaptures&) = delete;
  OutsideOfCaptures& operator=(const OutsideOfCaptures&) = delete;
  ~OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Where the host finds whether gradients were finite: pinned, so that a copy to it is queued. A
// call has one to itself until it was read; then it waits for the next call, of any thread.
class HostFlags {
 public:
  int* take() {
    {
      const std::lock_guard lock(mutex_);
      if (!spare_.empty()) {
        int* const flag = spare_.back();
        spare_.pop_back();
        return flag;
      }
    }
    int* flag = nullptr;
    check(cudaHostAlloc(&flag, sizeof(int), cudaHostAllocPortable), "allocate a flag");
    return flag;
  }
  void give(int* flag) {
    const std::lock_guard lock(mutex_);
    spare_.push_back(flag);
  }

 private:
  std::mutex mutex_;
  std::vector<int*> spare_;
};

// Never destroyed: at the end of a process the runtime may be gone already.
HostFlags& host_flags() {
  static auto* const flags = new HostFlags();
  return *flags;
}

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "make an event"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);  // after what waits for it
  }

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "record an event"); }
  void hold_up(cudaStream_t stream) {
    check(cudaStreamWaitEvent(stream, event_, 0), "wait for an event");
  }
  void wait() { check(cudaEventSynchronize(event_), "wait for the gradients"); }
  cudaEvent_t release() { return std::exchange(event_, nullptr); }

 private:
  cudaEvent_t event_;
};

__device__ float largest_of_warp(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lanes));
  }
  return x;
}

template <class Kernel>
constexpr int kBlocks = 0;  // that a multiprocessor must have room for; 0: any number
template <class Kernel>
  requires requires { Kernel::kBlocks; }
constexpr int kBlocks<Kernel> = Kernel::kBlocks;

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, kBlocks<Kernel>)
    run(const __grid_constant__ Kernel kernel) {
  const Place place{blockIdx.x, static_cast<int>(threadIdx.x)};
  if constexpr (requires { Kernel::kShared; }) {
    __shared__ double shared[Kernel::kShared];
    for (int phase = 0; phase < kernel.phases(); ++phase) {
      if (phase > 0) __syncthreads();
      kernel(place, shared, phase);
    }
  } else if constexpr (requires { requires Kernel::kHasLargest; }) {
    typename Kernel::Registers registers;
    const float largest = kernel.first_half(place, registers);
    kernel.second_half(place, registers, largest_of_warp(largest));
  } else {
    kernel(place);
  }
}

class Device {
 public:
  // What is repeatable may be captured into a graph, if nothing is waited for.
  explicit Device(const Queue& queue, bool is_repeatable = false)
      : current_(queue.device),
        stream_(reinterpret_cast<cudaStream_t>(queue.stream)),
        others_(queue.others) {
    require_no_capture(stream_, is_repeatable && others_.empty() && !queue.after_all);
    for (const std::uintptr_t other : others_) {
      require_no_capture(reinterpret_cast<cudaStream_t>(other));
    }
    if (queue.after_all) check(cudaDeviceSynchronize(), "finish what other streams have queued");
    for (const std::uintptr_t other : others_) {
      Event event;
      event.record(reinterpret_cast<cudaStream_t>(other));
      event.hold_up(stream_);
    }
  }

  // What is queued on the other streams from now on waits for what was queued here.
  void finish() {
    if (others_.empty()) return;
    Event event;
    event.record(stream_);
    for (const std::uintptr_t other : others_) event.hold_up(reinterpret_cast<cudaStream_t>(other));
  }

  // A workspace's last use, as allocate() made it: an event, recorded here after each.
  void wait_for(void* last_use) {
    check(cudaStreamWaitEvent(stream_, static_cast<cudaEvent_t>(last_use), 0),
          "wait for the scratch memory");
  }
  void note(void* last_use) {
    check(cudaEventRecord(static_cast<cudaEvent_t>(last_use), stream_), "record an event");
  }

  template <class Kernel>
  void launch(const Kernel& kernel) {
    static_assert(sizeof(Kernel) <= 32'764, "the limit of kernel arguments");
    void* arguments[] = {const_cast<Kernel*>(&kernel)};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(&run<Kernel>), dim3(kernel.blocks()),
                           dim3(Kernel::kThreads), arguments, 0, stream_),
          Kernel::kName);
  }

  // In parts of which the driver takes a copy at once; for more it may wait for the stream.
  void upload(void* to, const void* from, std::size_t bytes) {
    constexpr std::size_t kPart = 64 * 1024;
    for (std::size_t begin = 0; begin < bytes; begin += kPart) {
      check(cudaMemcpyAsync(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                            std::min(kPart, bytes - begin), cudaMemcpyHostToDevice, stream_),
            "upload groups");
    }
  }
  void clear(int* flag) { check(cudaMemsetAsync(flag, 0, sizeof(int), stream_), "clear a flag"); }
  void request(const int* flag) {
    host_flag_ = host_flags().take();
    check(cudaMemcpyAsync(host_flag_, flag, sizeof(int), cudaMemcpyDeviceToHost, stream_),
          "copy a flag");
    flag_is_there_.emplace().record(stream_);
  }
  // Waits for the reductions alone: the update behind them is under way meanwhile.
  int awaited_flag() {
    flag_is_there_->wait();
    const int flag = *host_flag_;
    host_flags().give(host_flag_);  // only now: a copy that nobody waited for may still come
    return flag;
  }

  void copy(void* to, const void* from, std::size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "copy");
    synchronize();
  }
  void synchronize() { check(cudaStreamSynchronize(stream_), "finish the queued work"); }

  static void require_usable(int device) {
    static std::atomic<std::uint64_t> known{0};  // devices found usable, a bit each
    const std::uint64_t bit = device >= 0 && device < 64 ? std::uint64_t{1} << device : 0;
    if ((known & bit) != 0) return;
    Found found;
    found.device = device;
    cudaRuntimeGetVersion(&found.runtime);
    cudaDriverGetVersion(&found.driver);
    const cudaError_t error = cudaGetDeviceCount(&found.devices);
    if (error != cudaSuccess) {
      cudaGetLastError();
      found.devices = 0;
      found.error = cudaGetErrorString(error);
    }
    if (device >= 0 && device < found.devices) {
      int major = 0, minor = 0;
      check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
            "ask for the compute capability");
      check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
            "ask for the compute capability");
      found.capability = 10 * major + minor;
    }
    std::vector<int> architectures{__CUDA_ARCH_LIST__};  // nvcc's, as 900 for 9.0
    for (int& architecture : architectures) architecture /= 10;
    const std::string why = why_unusable(found, architectures);
    if (!why.empty()) throw std::runtime_error(why);
    known |= bit;
  }

  static int device_of(const void* memory) {
    int device = 0;
    if (memory == nullptr) {  // an empty array
      check(cudaGetDevice(&device), "ask for the current device");
      return device;
    }
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, memory), "find the device of memory");
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
      throw std::runtime_error("its address is not in CUDA memory");
    }
    return attributes.device;
  }

  // With all that programs in it need, so that they allocate nothing.
  static Workspace allocate(int device, std::size_t bytes) {
    const CurrentDevice current(device);
    const OutsideOfCaptures outside;
    host_flags().give(host_flags().take());
    Event last_use;
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "allocate scratch memory");
    return {memory, bytes, last_use.release()};
  }
  // Errors have nobody to go to: at the end of a process the runtime may be gone already.
  static void deallocate(int device, const Workspace& workspace) {
    if (workspace.memory == nullptr) return;
    try {
      const CurrentDevice current(device);
      const OutsideOfCaptures outside;
      const auto last_use = static_cast<cudaEvent_t>(workspace.last_use);
      cudaEventSynchronize(last_use);
      cudaEventDestroy(last_use);
      cudaFree(workspace.memory);
    } catch (const std::runtime_error&) {
    }
  }

 private:
  static void require_no_capture(cudaStream_t stream, bool unless_active = false) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(stream, &status);
    if (unless_active && status == cudaStreamCaptureStatusActive) return;
    if (error == cudaErrorStreamCaptureImplicit || status != cudaStreamCaptureStatusNone) {
      cudaGetLastError();
      throw std::runtime_error(kCaptureRefused);
    }
    check(error, "ask whether the stream is being captured");
  }

  const CurrentDevice current_;
  const cudaStream_t stream_;
  const std::span<const std::uintptr_t> others_;
  int* host_flag_ = nullptr;
  std::optional<Event> flag_is_there_;
};

}  // namespace

const Backend& backend() {
  static const Backend kBackend = make_backend<Device>();
  return kBackend;
}

}  // namespace adamax::cuda

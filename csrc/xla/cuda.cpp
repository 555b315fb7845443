// The handler for XLA's CUDA backend: the step number and the rate stay in the GPU's memory.
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "adamax/cuda.hpp"
#include "xla/handler.hpp"

namespace adamax::xla {
namespace {

constexpr std::size_t kScratchAlignment = 16;  // cuda.hpp

void require_success(const Error* error, const char* what) {
  if (error != nullptr) throw std::runtime_error(std::string("XLA gives no ") + what);
}

// Memory of the device for the time of a call: what is queued by then may still use it, because
// XLA gives it to later work of the same stream only.
class Scratch {
 public:
  Scratch(const CallFrame& frame, std::size_t bytes) : frame_(frame), bytes_(bytes) {
    if (bytes == 0) return;
    DeviceMemoryAllocateArgs args{sizeof(args), nullptr,           frame.context,
                                  bytes,        kScratchAlignment, nullptr};
    require_success(frame.api->device_memory_allocate(&args), "scratch memory");
    data_ = args.data;
  }
  ~Scratch() {
    if (data_ == nullptr) return;
    DeviceMemoryFreeArgs args{sizeof(args), nullptr, frame_.context, bytes_, data_};
    frame_.api->device_memory_free(&args);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  const CallFrame& frame_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

cuda::Stream stream_of(const CallFrame& frame) {
  const Api& api = *frame.api;
  if (api.struct_size < offsetof(Api, device_ordinal_get) + sizeof(api.device_ordinal_get)) {
    throw std::runtime_error(
        "this jaxlib does not tell on which GPU a call runs; expected 0.6 or "
        "newer");
  }
  DeviceOrdinalGetArgs device{sizeof(device), nullptr, frame.context, 0};
  require_success(api.device_ordinal_get(&device), "number of the GPU");
  StreamGetArgs stream{sizeof(stream), nullptr, frame.context, nullptr};
  require_success(api.stream_get(&stream), "stream");
  return {device.device_ordinal, reinterpret_cast<std::uintptr_t>(stream.stream)};
}

void step_there(const CallFrame& frame) {
  StepCall call = read_call(frame);
  DeviceScalars& device = call.group.device;
  device.step = call.count->data;
  device.step_type = ScalarType::kInt32;
  device.raises_step = false;  // JAX does
  Call settings{.grad_scale = 1.0 / call.loss_scale};
  for (const StepCall::Array& array : call.arrays) {
    const bool is_float32 = array.value->dtype == DataType::kFloat32;
    if (array.setting == "learning_rate") {
      device.learning_rate = array.value->data;
      device.learning_rate_type = is_float32 ? ScalarType::kFloat32 : ScalarType::kFloat64;
    } else if (array.setting == "loss_scale" && is_float32) {
      settings.device.scale = static_cast<const float*>(array.value->data);
    } else {
      throw std::invalid_argument(std::string(array.setting) +
                                  " is an array; on a GPU only learning_rate and loss_scale "
                                  "(float32) can be one: name the others in static_args of "
                                  "inject_hyperparams");
    }
  }
  const cuda::Stream stream = stream_of(frame);
  const std::vector<Group> groups = call.groups();
  const Scratch scratch(frame, cuda::scratch_bytes(call.variables, groups, settings));
  cuda::step(stream, scratch.data(), call.variables, groups, settings);
}

}  // namespace

Error* step_on_cuda(CallFrame* frame) { return handle(*frame, step_there); }

}  // namespace adamax::xla

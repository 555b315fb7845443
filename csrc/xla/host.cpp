// The handlers in _core: the step on the CPU, and a refusal where a GPU has no kernels.
#include <cmath>
#include <cstdint>
#include <limits>

#include "adamax/adamax.hpp"
#include "xla/handler.hpp"

namespace adamax::xla {
namespace {

double number_at(const Buffer& buffer) {
  return buffer.dtype == DataType::kFloat64 ? *static_cast<const double*>(buffer.data)
                                            : *static_cast<const float*>(buffer.data);
}

void step_here(const CallFrame& frame) {
  StepCall call = read_call(frame);
  for (const StepCall::Array& array : call.arrays) {
    array.number_of(call) = number_at(*array.value);
  }
  // An error would come when the arrays that were donated are gone. So the weights become NaN, as
  // with other optimizers.
  if (!std::isfinite(call.group.learning_rate)) {
    call.group.learning_rate = 0.0;
    call.loss_scale = std::numeric_limits<double>::quiet_NaN();
  }
  call.group.step = std::int64_t{*static_cast<const std::int32_t*>(call.count->data)} + 1;
  step(call.variables, call.groups(), {.grad_scale = 1.0 / call.loss_scale});
}

}  // namespace

Error* step_on_host(CallFrame* frame) { return handle(*frame, step_here); }

Error* refuse(CallFrame* frame) {
  return handle(*frame, [](const CallFrame&) {
    throw std::invalid_argument(
        "this build of adamax_ext has no kernels for this GPU; expected arrays on the CPU, or a "
        "build with nvcc for an NVIDIA GPU: pip install with -Ccmake.define.ADAMAX_EXT_CUDA=ON");
  });
}

}  // namespace adamax::xla

// The handler for XLA's CPU backend.
#include <cstdint>

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
  for (const StepCall::Setting& setting : call.arrays) {
    setting.of(call) = number_at(*setting.value);
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

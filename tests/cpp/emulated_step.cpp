// The public calls for memory of a GPU, and their program run with streams and events, for tests by
// ctypes (tests/support/cuda_api.py): plain numbers in, a message out.
#include <cstdint>
#include <exception>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>
#if __has_include(<malloc.h>)
#include <malloc.h>
#endif

#include "adamax/cuda.hpp"
#include "cuda/backend.hpp"

namespace {

struct TestVariable {
  adamax::Arrays memory;
  std::int64_t size;
  std::int32_t pair, state, rounding;
  std::uint32_t group, number;
  std::int64_t first_element;
};

struct TestGroup {
  double learning_rate, beta_1, beta_2, epsilon, weight_decay, clipvalue, ema_momentum;
  std::int64_t step;
  std::uint64_t seed;
  void* device_step;
  const void* device_learning_rate;
  std::int32_t step_type, learning_rate_type, raises_step, decay, epsilon_rule, maximize;
};

struct TestCall {
  double grad_scale, clip_limit;
  std::int64_t micro_batches;
  const float *loss_scale, *found_inf;
  std::int32_t clip_rule, phase, overwrite, require_finite, writes_gradients;
  std::int32_t has_event;       // of the scratch memory
  std::uintptr_t other;         // stream; 0: none
  std::int64_t* scratch_bytes;  // where it is not null, they are all that is asked for
};

void run(std::uintptr_t stream, void* scratch, std::span<const adamax::Variable> variables,
         std::span<const adamax::Group> groups, const adamax::Call& call, const TestCall& test) {
  if (test.scratch_bytes != nullptr) {
    *test.scratch_bytes =
        static_cast<std::int64_t>(adamax::cuda::scratch_bytes(variables, groups, call));
  } else if (test.has_event != 0 || test.other != 0) {
    const adamax::Program program = adamax::make_program(variables, groups, call);
    const adamax::Backend& backend = adamax::cuda::backend();
    std::uintptr_t last_use = 0;
    const std::span<const std::uintptr_t> others(&test.other, test.other != 0);
    backend.run(
        {0, stream, others},
        {scratch, backend.scratch_bytes(program), test.has_event != 0 ? &last_use : nullptr},
        program);
  } else if (!adamax::cuda::step({0, stream}, scratch, variables, groups, call)) {
    throw std::runtime_error("a gradient is not finite");
  }
}

}  // namespace

// Returns null, or why it failed.
extern "C" [[gnu::visibility("default")]] const char* emulated_step(
    std::uintptr_t stream, void* scratch, const TestVariable* variables, std::size_t num_variables,
    const TestGroup* groups, std::size_t num_groups, const TestCall* c) {
  static std::string message;
#ifdef M_PERTURB
  mallopt(M_PERTURB, 0xa5);  // what is freed cannot be read any more
#endif
  std::vector<adamax::Variable> made;
  for (const TestVariable& v : std::span(variables, num_variables)) {
    const adamax::DTypePair pair = adamax::kPairs[v.pair];
    const adamax::Storage storage{pair.param, pair.grad, static_cast<adamax::StateFormat>(v.state),
                                  static_cast<adamax::WeightRounding>(v.rounding)};
    const bool has_accumulated = v.memory.accumulator != nullptr;
    made.push_back(
        {v.memory, v.size, storage, v.group, has_accumulated, v.number, v.first_element});
  }
  std::vector<adamax::Group> made_groups;
  for (const TestGroup& g : std::span(groups, num_groups)) {
    adamax::Group group{g.learning_rate, g.beta_1, g.beta_2, g.epsilon, g.weight_decay};
    group.decay = static_cast<adamax::DecayRule>(g.decay);
    group.epsilon_rule = static_cast<adamax::EpsilonRule>(g.epsilon_rule);
    if (g.clipvalue != 0) group.clipvalue = g.clipvalue;
    group.ema_momentum = g.ema_momentum;
    group.step = g.step;
    group.seed = g.seed;
    group.maximize = g.maximize != 0;
    group.device = {g.device_step, g.device_learning_rate,
                    static_cast<adamax::ScalarType>(g.step_type),
                    static_cast<adamax::ScalarType>(g.learning_rate_type), g.raises_step != 0};
    made_groups.push_back(group);
  }
  adamax::Call call;
  call.grad_scale = c->grad_scale;
  call.clip = {static_cast<adamax::ClipRule>(c->clip_rule), c->clip_limit};
  call.micro_batches = c->micro_batches;
  call.phase = static_cast<adamax::Phase>(c->phase);
  call.overwrite = c->overwrite != 0;
  call.require_finite = c->require_finite != 0;
  call.device = {c->loss_scale, c->found_inf, c->writes_gradients != 0};
  try {
    run(stream, scratch, made, made_groups, call, *c);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

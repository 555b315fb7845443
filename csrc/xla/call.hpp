// A call of XLA as a call of adamax: what the buffers and attributes of a step mean.
#pragma once

#include <cstdint>
#include <vector>

#include "adamax/adamax.hpp"
#include "xla/ffi.hpp"

namespace adamax::xla {

// Arguments are the parameters, the first moments, the infinity norms, the number of completed
// steps (int32), the gradients, and settings that are arrays. Results are all but the last two, at
// the same places in memory.
//
// Attributes are `decay` and `epsilon_mode`, and those of the settings `learning_rate`, `b1`, `b2`,
// `eps` and `weight_decay` that are numbers; the others are the last arguments, in this order.
struct StepCall {
  std::vector<Variable> variables;  // that have elements
  Group group;                      // without the step number and settings that are arrays
  const Buffer* count;
  // The settings that are arrays, each with its name; their values may lie on a device.
  struct Setting {
    const char* name;
    double Group::* member;
    const Buffer* value;
  };
  std::vector<Setting> arrays;
};

// Throws std::invalid_argument if a buffer is not as it has to be. Reads no buffer.
StepCall read_call(const CallFrame& frame);

}  // namespace adamax::xla

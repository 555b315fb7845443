// A call of XLA as a call of adamax: what the buffers and attributes of a step mean.
#pragma once

#include <string_view>
#include <vector>

#include "adamax/adamax.hpp"
#include "xla/ffi.hpp"

namespace adamax::xla {

// Arguments are the parameters, the first moments, the infinity norms and, with `ema_momentum`, the
// averages of the weights; the number of completed steps (int32); the gradients, of the first
// parameters or of all; and settings that are arrays. Results are the arrays before the number, at
// the same places in memory.
//
// Attributes are `decay` and `epsilon_mode`; how many parameters, the first ones, have `decayed`
// weights; those of `learning_rate`, `b1`, `b2`, `eps`, `weight_decay` and `loss_scale` that are
// numbers (the others are the last arguments, in this order); and perhaps `clipvalue` and
// `ema_momentum`.
struct StepCall {
  std::vector<Variable> variables;  // that have elements
  Group group;                      // without what lies in buffers
  bool all_decay;                   // else there is a second group, without weight decay
  double loss_scale = 1.0;          // divides the gradients
  const Buffer* count;
  struct Array {
    std::string_view setting;
    double& (*number_of)(StepCall&);
    const Buffer* value;  // may lie on a device
  };
  std::vector<Array> arrays;

  std::vector<Group> groups() const;
};

// Throws std::invalid_argument if something is not as it has to be. Reads no buffer.
StepCall read_call(const CallFrame& frame);

}  // namespace adamax::xla

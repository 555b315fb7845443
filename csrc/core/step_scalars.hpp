// The scalars of one step: computed in double from the step number alone, rounded once by the
// kernel.
//
// Plain data only: kernel units include this file under their own instruction-set flags.
#pragma once

#include <cstdint>

namespace adamax {

enum class AverageMode : std::uint8_t {
  kStart,    // average = w, at the first update
  kRunning,  // average = average * k + w * (1 - k)
  kKeep,     // the average is only read, to overwrite w with it
};

// Doubles here; a kernel rounds each to its compute type before the loop, the only rounding there
// is. A setting that is off has its identity here: multiplying by 1 and clipping at infinity are
// exact.
struct StepScalars {
  double grad_scale = 1.0;  // s
  double mean_scale = 1.0;  // a = 1 / accumulation steps
  double clip_value;        // v
  double decay;             // learning_rate * weight_decay, or weight_decay for the L2 rule
  double one_minus_beta_1;
  double beta_2;
  double epsilon;
  double rate;  // learning_rate / (1 - beta_1^t)
  double ema_momentum;
  double one_minus_ema_momentum;
  AverageMode average_mode;
  bool overwrite;  // w = average at the end
};

struct Hyperparameters;
struct Call;

StepScalars make_step_scalars(const Hyperparameters& hyperparameters, const Call& call);

}  // namespace adamax

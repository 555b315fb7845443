// The scalars of a group in one step: computed in double from the step number alone, rounded once
// by the kernel.
//
// Plain data only: kernel units include this file under their own instruction-set flags.
#pragma once

#include <cstdint>

#include "adamax/rules.hpp"
#include "core/host_device.hpp"

namespace adamax {

enum class AverageMode : std::uint8_t {
  kStart,    // average = w, at the first update
  kRunning,  // average = average * k + w * (1 - k)
  kKeep,     // the average is only read, to overwrite w with it
};

// Doubles here; a kernel rounds each to its compute type before the loop, the only rounding there
// is. A setting that is off has its identity here: multiplying by 1 and clipping at infinity are
// exact.
struct Scalars {
  double grad_scale = 1.0;  // s; negative to maximize
  double mean_scale = 1.0;  // a = 1 / micro-batches
  double clip_value = __builtin_inf();
  double decay = 0.0;  // learning_rate * weight_decay, or weight_decay for the L2 rule
  double one_minus_beta_1 = 0.0;
  double beta_2 = 0.0;
  double epsilon = 0.0;
  double rate = 0.0;  // learning_rate / (1 - beta_1^t)
  double ema_momentum = 0.0;
  std::uint64_t seed = 0, step = 0;  // of random numbers
  DecayRule decay_rule{};
  EpsilonRule epsilon_rule{};
  AverageMode average_mode{};
  bool overwrite = false;  // w = average at the end
  // Times the unscaled gradient it is what is written back, without the sign of an ascending group;
  // 0: nothing is.
  std::int8_t gradient_sign = 0;
};

// Sets what follows from the learning rate and the number of the step. Before, `decay` is the
// weight decay.
ADAMAX_HOST_DEVICE void set_rate(Scalars& s, double learning_rate, double bias_correction,
                                 std::int64_t step) {
  s.rate = learning_rate / bias_correction;
  if (s.decay_rule == DecayRule::kDecoupled) s.decay = learning_rate * s.decay;
  s.average_mode = step == 1 ? AverageMode::kStart : AverageMode::kRunning;
  s.step = static_cast<std::uint64_t>(step);
}

struct Group;
struct Call;

// Throw std::invalid_argument for a setting out of range. What lies in device memory is not known,
// and the group's own number in its place is not looked at.
void check_call(const Call& call);
void check_group(const Group& group, const Call& call);

// Of checked settings, before set_rate(): `rate` is still the learning rate, or 0 where that lies
// in device memory, and `decay` the weight decay.
Scalars make_base_scalars(const Group& group, const Call& call);
// With set_rate(); `bias_correction` is 1 - beta_1^step. Throws std::invalid_argument for a rate or
// a decay that overflows.
Scalars make_scalars(const Group& group, const Call& call, double bias_correction);

// Throws std::invalid_argument if a scalar, made of a group and a call, is lost in float32: an
// epsilon that becomes 0, a rate that becomes infinite.
void require_float32(const Scalars& scalars, const Group& group, const Call& call);
// Throws std::invalid_argument for settings that state in 8 bits cannot have.
void require_8_bits(const Group& group);

}  // namespace adamax

// Checks the settings of a call and turns them into its scalars.
#include "core/scalars.hpp"

#include <cmath>
#include <cstdio>

#include "adamax/adamax.hpp"

namespace adamax {
namespace {

void require(bool valid, const char* name, const char* wanted, double received) {
  if (valid) return;
  char number[32];
  std::snprintf(number, sizeof(number), "%.17g", received);
  throw std::invalid_argument(std::string(name) + " must be " + wanted + "; received " + number);
}

void require_not_negative(const char* name, double value) {
  require(value >= 0 && std::isfinite(value), name, "finite and >= 0", value);
}
void require_positive(const char* name, double value) {
  require(value > 0 && std::isfinite(value), name, "finite and > 0", value);
}
void require_beta(const char* name, double value) {
  require(value >= 0 && value < 1, name, "in [0, 1)", value);
}

}  // namespace

void check_group(const Group& g, const Call& call) {
  if (g.device.learning_rate == nullptr) {
    require(std::isfinite(g.learning_rate), "learning_rate", "finite", g.learning_rate);
  }
  require_beta("beta_1", g.beta_1);
  require_beta("beta_2", g.beta_2);
  if (g.epsilon_rule == EpsilonRule::kInside) {
    require_not_negative("epsilon", g.epsilon);
  } else {
    require_positive("epsilon", g.epsilon);
  }
  require_not_negative("weight_decay", g.weight_decay);
  if (g.clipvalue) {
    require_positive("clipvalue", *g.clipvalue);
    require(call.clip.rule == ClipRule::kNone, "clipvalue", "unset where a norm is clipped",
            *g.clipvalue);
  }
  require(g.ema_momentum >= 0 && g.ema_momentum <= 1, "ema_momentum", "in [0, 1]", g.ema_momentum);
  if (g.device.step == nullptr) require(g.step >= 1, "step", ">= 1", static_cast<double>(g.step));
  require(g.decay != DecayRule::kNone || g.weight_decay == 0, "weight_decay",
          "0 with DecayRule::kNone", g.weight_decay);
}

void check_call(const Call& call) {
  require(!std::isinf(call.grad_scale), "grad_scale", "finite, or NaN", call.grad_scale);
  if (call.clip.rule != ClipRule::kNone) {
    require_positive(call.clip.rule == ClipRule::kNorm ? "clipnorm" : "global_clipnorm",
                     call.clip.limit);
  }
  require(call.micro_batches >= 1, "micro_batches", ">= 1",
          static_cast<double>(call.micro_batches));
  const DeviceLossScale& device = call.device;
  require(device.scale != nullptr || !device.writes_gradients, "writes_gradients",
          "false without a loss scale in device memory", device.writes_gradients);
  require((call.micro_batches == 1 && call.phase != Phase::kAccumulate) || !device.writes_gradients,
          "writes_gradients", "false where gradients are accumulated", device.writes_gradients);
}

Scalars make_base_scalars(const Group& g, const Call& call) {
  Scalars s;
  s.grad_scale = g.maximize ? -call.grad_scale : call.grad_scale;
  s.mean_scale = 1.0 / static_cast<double>(call.micro_batches);
  if (g.clipvalue) s.clip_value = *g.clipvalue;
  s.decay_rule = g.weight_decay == 0 ? DecayRule::kNone : g.decay;
  s.decay = g.weight_decay;
  s.one_minus_beta_1 = 1.0 - g.beta_1;
  s.beta_2 = g.beta_2;
  s.epsilon = g.epsilon;
  s.epsilon_rule = g.epsilon_rule;
  s.rate = g.device.learning_rate == nullptr ? g.learning_rate : 0.0;
  s.ema_momentum = g.ema_momentum;
  s.seed = g.seed;
  s.overwrite = call.overwrite;
  if (call.device.writes_gradients) s.gradient_sign = g.maximize ? -1 : 1;
  return s;
}

Scalars make_scalars(const Group& g, const Call& call, double bias_correction) {
  Scalars s = make_base_scalars(g, call);
  set_rate(s, g.learning_rate, bias_correction, g.step);
  require(std::isfinite(s.rate), "learning_rate",
          "small enough that learning_rate / (1 - beta_1^step) is finite", g.learning_rate);
  require(std::isfinite(s.decay), "weight_decay",
          "small enough that learning_rate * weight_decay is finite", g.weight_decay);
  return s;
}

void require_float32(const Scalars& s, const Group& g, const Call& call) {
  const auto becomes_zero = [](double x) { return x != 0 && static_cast<float>(x) == 0; };
  const auto becomes_infinite = [](double x) { return std::isinf(static_cast<float>(x)); };
  const char* const wanted = "a number that float32 rounds neither to 0 nor to infinity";
  const bool may_be_zero = s.epsilon_rule == EpsilonRule::kInside;
  require((may_be_zero || !becomes_zero(s.epsilon)) && !becomes_infinite(s.epsilon), "epsilon",
          wanted, g.epsilon);
  require(!becomes_zero(s.clip_value), "clipvalue", "a number that float32 does not round to 0",
          s.clip_value);
  require(!becomes_zero(s.grad_scale) && !becomes_infinite(s.grad_scale),
          "grad_scale (1 / loss_scale_factor)", wanted, call.grad_scale);
  require(!becomes_infinite(s.rate), "learning_rate",
          "small enough that learning_rate / (1 - beta_1^step) is finite in float32",
          g.learning_rate);
  require(!becomes_infinite(s.decay), "weight_decay",
          "small enough that learning_rate * weight_decay is finite in float32", g.weight_decay);
}

void require_8_bits(const Group& g) {
  require(g.beta_1 < g.beta_2, "beta_1", "below beta_2 with state in 8 bits", g.beta_1);
  // Of a norm below it nothing is stored: then epsilon alone divides.
  require(g.epsilon >= 0x1p-86, "epsilon", ">= 2^-86 with state in 8 bits", g.epsilon);
}

}  // namespace adamax

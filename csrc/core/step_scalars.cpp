// Checks the settings of a step and turns them into its scalars.
#include "core/step_scalars.hpp"

#include <cmath>
#include <cstdio>
#include <limits>

#include "adamax/adamax.hpp"

namespace adamax {
namespace {

void require(bool valid, const char* name, const char* wanted, double received) {
  if (valid) return;
  char number[32];
  std::snprintf(number, sizeof(number), "%.17g", received);
  throw std::invalid_argument(std::string(name) + " must be " + wanted + "; received " + number);
}

void require_positive(const char* name, const std::optional<double>& value) {
  if (value) require(*value > 0 && std::isfinite(*value), name, "finite and > 0", *value);
}

void check(const Hyperparameters& h, const Call& call) {
  const auto in_range = [](double beta) { return beta >= 0 && beta < 1; };
  require(h.learning_rate >= 0 && std::isfinite(h.learning_rate), "learning_rate",
          "finite and >= 0", h.learning_rate);
  require(in_range(h.beta_1), "beta_1", "in [0, 1)", h.beta_1);
  require(in_range(h.beta_2), "beta_2", "in [0, 1)", h.beta_2);
  require(h.epsilon > 0 && std::isfinite(h.epsilon), "epsilon", "finite and > 0", h.epsilon);
  require(h.weight_decay >= 0 && std::isfinite(h.weight_decay), "weight_decay", "finite and >= 0",
          h.weight_decay);
  require_positive("clipnorm", h.clipnorm);
  require_positive("global_clipnorm", h.global_clipnorm);
  require_positive("clipvalue", h.clipvalue);
  const int clips =
      h.clipnorm.has_value() + h.global_clipnorm.has_value() + h.clipvalue.has_value();
  require(clips <= 1, "clipnorm, global_clipnorm and clipvalue", "set one at a time", clips);
  require(h.ema_momentum >= 0 && h.ema_momentum <= 1, "ema_momentum", "in [0, 1]", h.ema_momentum);
  require(h.gradient_accumulation_steps >= 1, "gradient_accumulation_steps", ">= 1",
          static_cast<double>(h.gradient_accumulation_steps));
  require(call.step >= 1, "step", ">= 1", static_cast<double>(call.step));
  require(std::isfinite(call.grad_scale), "grad_scale", "finite", call.grad_scale);
  require(call.loss_scale > 0 && std::isfinite(call.loss_scale), "loss_scale", "finite and > 0",
          call.loss_scale);
}

// 1 - beta_1^t without cancellation, from t alone: a running product would drift.
double bias_correction(double beta_1, std::int64_t t) {
  return beta_1 > 0 ? -std::expm1(static_cast<double>(t) * std::log(beta_1)) : 1.0;
}

}  // namespace

StepScalars make_step_scalars(const Hyperparameters& h, const Call& call) {
  check(h, call);
  StepScalars s;
  s.grad_scale = call.grad_scale / call.loss_scale;
  s.mean_scale = 1.0 / static_cast<double>(h.gradient_accumulation_steps);
  s.clip_value = h.clipvalue.value_or(std::numeric_limits<double>::infinity());
  s.decay = h.decay == Decay::kL2 ? h.weight_decay : h.learning_rate * h.weight_decay;
  s.one_minus_beta_1 = 1.0 - h.beta_1;
  s.beta_2 = h.beta_2;
  s.epsilon = h.epsilon;
  s.rate = h.learning_rate / bias_correction(h.beta_1, call.step);
  s.ema_momentum = h.ema_momentum;
  s.one_minus_ema_momentum = 1.0 - h.ema_momentum;
  s.average_mode = call.step == 1 ? AverageMode::kStart : AverageMode::kRunning;
  s.overwrite = call.overwrite;
  return s;
}

}  // namespace adamax

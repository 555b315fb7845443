// The rules in which Adamax differs between libraries.
//
// Plain data only: kernel units include this file under their own instruction-set flags.
#pragma once

#include <cstdint>

namespace adamax {

enum class DecayRule : std::uint8_t {
  kNone,
  kDecoupled,  // w = w - w * (learning_rate * weight_decay), as in Keras
  kL2,         // gradient = gradient + w * weight_decay, as in torch
};
enum class EpsilonRule : std::uint8_t {
  kOutside,  // w - rate * m / (u + epsilon), as in Keras
  kInside,   // u = max(beta_2 * u, |gradient| + epsilon), as in torch and optax
};

}  // namespace adamax

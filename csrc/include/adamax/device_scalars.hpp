// Numbers of a call that lie in the memory of a GPU, where its kernels read them.
//
// Plain data only: kernels include this file.
#pragma once

#include <cstdint>

namespace adamax {

enum class ScalarType : std::uint8_t { kFloat32, kFloat64, kInt32 };

// Of a group. Null: the number of the group itself counts.
struct DeviceScalars {
  void* step = nullptr;  // how many were done before this one: Group::step - 1
  const void* learning_rate = nullptr;
  ScalarType step_type = ScalarType::kFloat32;
  ScalarType learning_rate_type = ScalarType::kFloat32;
  // An update adds 1, as torch does: in the type of the number. No other group reads it then.
  bool raises_step = true;
};

// Of a call, for torch's GradScaler.
struct DeviceLossScale {
  const float* scale = nullptr;      // divides Call::grad_scale
  const float* found_inf = nullptr;  // where it is not 0, nothing is changed and no step counted
  // An update writes the gradient that it unscaled over the one that it read, rounded to its type
  // and with its own sign also where a group ascends, as torch's fused optimizers do. It goes on
  // with the one before the rounding. No two variables have one gradient then.
  bool writes_gradients = false;
};

}  // namespace adamax

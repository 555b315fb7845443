// The kernel that makes the scalars of groups of numbers in device memory, before all others run.
#pragma once

#include <cstdint>

#include "core/bias_correction.hpp"
#include "core/program.hpp"
#include "cuda/kernels.hpp"
#include "cuda/tables.hpp"

namespace adamax::cuda {

struct GroupRow {
  Scalars base;
  DeviceGroup device;
  std::uint32_t group;
};

ADAMAX_HOST_DEVICE double read_number(const void* memory, ScalarType type) {
  if (type == ScalarType::kFloat32) return *static_cast<const float*>(memory);
  if (type == ScalarType::kFloat64) return *static_cast<const double*>(memory);
  return *static_cast<const std::int32_t*>(memory);
}
ADAMAX_HOST_DEVICE void write_number(double number, void* memory, ScalarType type) {
  if (type == ScalarType::kFloat32) *static_cast<float*>(memory) = static_cast<float>(number);
  if (type == ScalarType::kFloat64) *static_cast<double*>(memory) = number;
  if (type == ScalarType::kInt32) {
    constexpr double kMost = 0x7fff'ffff;  // it stays there, as optax has it
    *static_cast<std::int32_t*>(memory) =
        static_cast<std::int32_t>(number < kMost ? number : kMost);
  }
}

// A thread has a group. What a host would refuse, a count below 0 or a scale of 0, becomes NaN or
// infinite here, and so do the weights.
template <bool is_small>
struct MakeGroups {
  static constexpr const char* kName = "groups";
  static constexpr int kThreads = 32;
  RowTable<GroupRow, is_small> table;
  // By group; null where no row is computed in the type.
  GroupScalars<scalar::F32>* floats;
  GroupScalars<scalar::F64>* doubles;
  std::uint64_t* steps;  // null where no random numbers follow from them
  DeviceLossScale loss_scale;
  int* vetoed;  // null where no number vetoes
  bool counts_steps;

  std::uint32_t blocks() const { return (table.count + kThreads - 1) / kThreads; }

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    const std::uint32_t i = place.block * kThreads + place.thread;
    if (i >= table.count) return;
    const bool is_vetoed = vetoed != nullptr && *loss_scale.found_inf != 0;
    if (vetoed != nullptr && i == 0) *vetoed = is_vetoed;

    const GroupRow& row = table.rows[i];
    const DeviceScalars& memory = row.device.memory;
    Scalars s = row.base;
    if (loss_scale.scale != nullptr) {
      s.grad_scale = s.grad_scale / static_cast<double>(*loss_scale.scale);
    }
    const double learning_rate = memory.learning_rate != nullptr
                                     ? read_number(memory.learning_rate, memory.learning_rate_type)
                                     : s.rate;
    std::int64_t step = row.device.step;
    if (memory.step != nullptr) {
      double next = read_number(memory.step, memory.step_type) + 1.0;
      if (memory.step_type == ScalarType::kFloat32) next = static_cast<float>(next);
      step = next >= 1 && next < 0x1p63 ? static_cast<std::int64_t>(next) : 0;
      if (counts_steps && memory.raises_step && !is_vetoed) {
        write_number(next, memory.step, memory.step_type);
      }
    }
    const double bias = step >= 1 ? bias_correction(row.device.beta_1, step) : __builtin_nan("");
    set_rate(s, learning_rate, bias, step);
    if (floats != nullptr) floats[row.group] = GroupScalars<scalar::F32>(s);
    if (doubles != nullptr) doubles[row.group] = GroupScalars<scalar::F64>(s);
    if (steps != nullptr) steps[row.group] = s.step;
  }
};

}  // namespace adamax::cuda

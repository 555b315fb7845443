// A call as plain data: all checks are made and all decisions taken; a backend only runs it.
#include "core/program.hpp"

#include <algorithm>
#include <limits>

#include "core/bias_correction.hpp"
#include "core/fp_mode.hpp"

namespace adamax {
namespace {

int storage_index(const Storage& storage) {
  for (int index = 0; index < kNumStorages; ++index) {
    if (storage_at(index) == storage && exists(storage)) return index;
  }
  constexpr const char* kStates[] = {"full", "16-bit", "8-bit"};
  constexpr const char* kRoundings[] = {"rounded to nearest", "rounded at random",
                                        "with a remainder"};
  throw std::invalid_argument("no kernel for " + std::string(dtype_name(storage.param)) +
                              " parameters " + kRoundings[static_cast<int>(storage.rounding)] +
                              " with " + std::string(dtype_name(storage.grad)) + " gradients and " +
                              kStates[static_cast<int>(storage.state)] + " state");
}

[[noreturn]] void refuse(std::size_t variable, const std::string& why) {
  throw std::invalid_argument("variables[" + std::to_string(variable) + "] " + why);
}

// What a call does to a variable.
Operation operation_of(const Variable& v, const Call& call) {
  switch (call.phase) {
    case Phase::kAccumulate:
      return v.memory.grad != nullptr ? Operation::kAccumulate : Operation::kNone;
    case Phase::kUpdate:
      if (v.memory.grad != nullptr || (v.has_accumulated && call.micro_batches > 1)) {
        return Operation::kUpdate;
      }
      return v.memory.average != nullptr ? Operation::kAverage : Operation::kNone;
    case Phase::kFinalize:
      return v.memory.average != nullptr ? Operation::kAverage : Operation::kNone;
  }
  __builtin_unreachable();
}

// Throws std::invalid_argument if the variable lacks memory that its operation needs.
Arrays memory_for(Operation operation, std::size_t i, const Variable& v, const Call& call) {
  Arrays memory = v.memory;
  if (memory.param == nullptr || memory.momentum == nullptr || memory.norm == nullptr) {
    refuse(i, "must have memory for param, momentum and norm; received a null pointer");
  }
  if (memory.average == nullptr && call.overwrite) {
    refuse(i, "must have an average to be overwritten with it; received a null pointer");
  }
  if (memory.norm_scale == nullptr && v.storage.state != StateFormat::kFull) {
    refuse(i,
           "must have a norm_scale where its state is smaller than full; received a null pointer");
  }
  if (memory.remainder == nullptr && v.storage.rounding == WeightRounding::kRemainder) {
    refuse(i, "must have a remainder with WeightRounding::kRemainder; received a null pointer");
  }
  const bool accumulates = call.micro_batches > 1 || call.phase == Phase::kAccumulate;
  if (memory.accumulator == nullptr && accumulates) {
    refuse(i, "must have an accumulator when gradients are accumulated; received a null pointer");
  }
  if (!accumulates || operation == Operation::kAverage) memory.accumulator = nullptr;
  return memory;
}

bool takes_device_scalars(std::span<const Group> groups, const Call& call) {
  return call.device.scale != nullptr || call.device.found_inf != nullptr ||
         std::any_of(groups.begin(), groups.end(), [](const Group& group) {
           return group.device.step != nullptr || group.device.learning_rate != nullptr;
         });
}

// Calls `check` on a group of a call, with its number in what is thrown if there are several. Not
// inline: the loop over variables lost 12 ns each by it.
template <class Check>
[[gnu::noinline]] void check_in_group(std::size_t number, std::span<const Group> groups,
                                      const Check& check) {
  try {
    check(groups[number]);
  } catch (const std::invalid_argument& error) {
    if (groups.size() == 1) throw;
    throw std::invalid_argument(error.what() + std::string(" (in groups[") +
                                std::to_string(number) + "])");
  }
}

// The scalars of all groups, or their base scalars where nothing here may follow from rate and
// step. Throws std::invalid_argument, with the group's number if there are several.
std::vector<Scalars> scalars_of(std::span<const Group> groups, const Call& call, bool only_base) {
  std::vector<Scalars> scalars;
  scalars.reserve(groups.size());
  const Group* before = nullptr;
  double bias = 0.0;  // of the group before
  for (std::size_t i = 0; i < groups.size(); ++i) {
    check_in_group(i, groups, [&](const Group& group) {
      check_group(group, call);
      if (only_base) {
        scalars.push_back(make_base_scalars(group, call));
        return;
      }
      // Groups mostly differ in something else, and the power is the dearest of their scalars.
      if (before == nullptr || group.beta_1 != before->beta_1 || group.step != before->step) {
        bias = bias_correction(group.beta_1, group.step);
      }
      scalars.push_back(make_scalars(group, call, bias));
      before = &group;
    });
  }
  return scalars;
}

}  // namespace

Program make_program(std::span<const Variable> variables, std::span<const Group> groups,
                     const Call& call) {
  const FloatingPointMode ieee;
  check_call(call);
  Program program;
  program.require_finite = call.require_finite;
  if (call.phase == Phase::kUpdate) program.clip = call.clip;
  program.sums_accumulators = program.clip.rule != ClipRule::kNone && call.micro_batches > 1;
  const bool needs_rates = call.phase != Phase::kFinalize;
  const bool for_device = needs_rates && takes_device_scalars(groups, call);
  program.groups = scalars_of(groups, call, for_device || !needs_rates);
  if (for_device) {
    if (call.require_finite) {
      throw std::invalid_argument(
          "require_finite must be false where numbers are taken from device memory, found_inf "
          "among them; received true");
    }
    program.device_groups.reserve(groups.size());
    for (const Group& group : groups) {
      program.device_groups.push_back({group.beta_1, group.step, group.device});
    }
    program.loss_scale = call.device;
    program.counts_steps = call.phase == Phase::kUpdate;
  }
  if (call.phase == Phase::kFinalize) {
    for (Scalars& scalars : program.groups) {
      scalars.average_mode = AverageMode::kKeep;
      scalars.overwrite = true;
    }
  }

  std::size_t fits_float32 = groups.size(), fits_8_bits = groups.size();  // checked last
  int index = 0;  // of the storage that was looked up last: mostly the same again
  program.rows.reserve(variables.size());
  for (std::size_t i = 0; i < variables.size(); ++i) {
    const Variable& v = variables[i];
    if (v.group >= groups.size()) {
      refuse(i, "must have a group below the number of groups, " + std::to_string(groups.size()) +
                    "; received " + std::to_string(v.group));
    }
    if (v.size < 0) refuse(i, "must have a size >= 0; received " + std::to_string(v.size));
    Storage storage = v.storage;
    // A gradient that is not there has the type in which it is computed, as the accumulator has.
    if (v.memory.grad == nullptr) storage.grad = compute_dtype(storage.param);
    if (!(storage_at(index) == storage)) index = storage_index(storage);
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
    if (v.first_element < 0 || v.first_element % kStateBlock != 0 ||
        v.first_element > kMost - v.size) {
      refuse(i, "must have a first_element that is a multiple of " + std::to_string(kStateBlock) +
                    ", >= 0 and, with its size, below 2^63; received " +
                    std::to_string(v.first_element));
    }
    if (v.size == 0) continue;
    const Operation operation = operation_of(v, call);
    const Arrays memory = memory_for(operation, i, v, call);
    if (operation == Operation::kNone) continue;
    if (compute_dtype(storage.param) == DType::kFloat32 && operation != Operation::kAverage &&
        v.group != fits_float32) {
      check_in_group(v.group, groups, [&](const Group& group) {
        require_float32(program.groups[v.group], group, call);
      });
      fits_float32 = v.group;
    }
    if (storage.state == StateFormat::k8Bits && operation == Operation::kUpdate &&
        v.group != fits_8_bits) {
      check_in_group(v.group, groups, require_8_bits);
      fits_8_bits = v.group;
    }
    program.has_16_bits |= storage.state == StateFormat::k16Bits && operation == Operation::kUpdate;
    const bool has_summands =
        operation != Operation::kAverage && (memory.grad != nullptr || program.sums_accumulators);
    program.rows.push_back({memory, v.size, static_cast<std::uint32_t>(i), v.group,
                            static_cast<std::uint8_t>(index), operation,
                            /*is_summed=*/has_summands, v.number, v.first_element});
  }
  return program;
}

Program make_norm_program(std::span<const ConstBuffer> buffers) {
  Program program;
  program.groups.resize(1);
  program.wants_norm = true;
  program.rows.reserve(buffers.size());
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const ConstBuffer& buffer = buffers[i];
    if (buffer.size == 0) continue;
    if (buffer.size < 0 || buffer.data == nullptr) {
      throw std::invalid_argument("buffers[" + std::to_string(i) +
                                  "] must have memory and a size >= 0; received size " +
                                  std::to_string(buffer.size));
    }
    const int index = storage_index({buffer.dtype, buffer.dtype});
    program.rows.push_back({{.grad = buffer.data},
                            buffer.size,
                            static_cast<std::uint32_t>(i),
                            0,
                            static_cast<std::uint8_t>(index),
                            Operation::kNone,
                            /*is_summed=*/true});
  }
  return program;
}

}  // namespace adamax

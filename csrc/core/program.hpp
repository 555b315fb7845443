// A call as plain data: all checks are made and all decisions taken; a backend only runs it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "adamax/adamax.hpp"
#include "core/scalars.hpp"

namespace adamax {

enum class Operation : std::uint8_t {
  kNone,        // only summed
  kUpdate,      // with the average and the accumulator that its memory has; a null gradient is 0
  kAccumulate,  // accumulator += gradient * grad_scale
  kAverage,     // the average alone
};

// The work on one variable that is not empty. A pointer is null where its array is not touched.
struct Row {
  Arrays memory;
  std::int64_t size;       // elements
  std::uint32_t variable;  // its position in the call
  std::uint32_t group;     // whose scalars count
  std::uint8_t storage;    // storage_at()
  Operation operation;
  bool is_summed;            // counts for norms and finiteness
  std::uint32_t number = 0;  // for random numbers
  std::int64_t first_element = 0;

  DType param_dtype() const { return storage_at(storage).param; }
  DType grad_dtype() const { return storage_at(storage).grad; }
};

// What the scalars of a group are made of beside its base scalars, where a program takes numbers
// from device memory.
struct DeviceGroup {
  double beta_1;
  std::int64_t step;  // unless it lies in device memory
  DeviceScalars memory;
};

// First the sums, if there are any; then, unless a gradient is not finite, the operations.
struct Program {
  std::vector<Scalars> groups;
  // Numbers in device memory. If there are any, this has an entry for each group, and the groups
  // are their base scalars: the device makes the others, at the begin.
  std::vector<DeviceGroup> device_groups;
  DeviceLossScale loss_scale;
  bool counts_steps = false;  // adds 1 to steps in device memory, where groups ask for it
  std::vector<Row> rows;      // in the order of the variables, in which norms add up
  Clip clip;                  // by the sums
  bool require_finite = false;
  // Sums are of the gradients as a clip sees them: unscaled, and averaged with the accumulators;
  // or of the gradients alone. Finiteness is always that of the gradient as it was passed, because
  // what was accumulated is finite already, and a scale can make a finite number infinite.
  bool sums_accumulators = false;
  bool wants_norm = false;   // Outcome::norm
  bool has_16_bits = false;  // in an update: scales that decay when nobody reads them any more

  bool has_device_scalars() const { return !device_groups.empty(); }
  // Whether it may be run again and again as it is: no step number is part of it.
  bool is_repeatable() const {
    return has_device_scalars() &&
           std::all_of(device_groups.begin(), device_groups.end(),
                       [](const DeviceGroup& group) { return group.memory.step != nullptr; });
  }
  bool has_sums() const { return clip.rule != ClipRule::kNone || require_finite || wants_norm; }
};

struct Outcome {
  bool is_finite = true;  // false: nothing was changed, because `require_finite` was asked for
  double norm = 0.0;      // over all rows; only if wanted
};

// Throws as step() does; nothing is written before it returns.
Program make_program(std::span<const Variable> variables, std::span<const Group> groups,
                     const Call& call);
Program make_norm_program(std::span<const ConstBuffer> buffers);

}  // namespace adamax

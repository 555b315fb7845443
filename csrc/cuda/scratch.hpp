// The scratch memory of a program: what lies where in it, and how much it is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "core/program.hpp"
#include "core/sum_shape.hpp"
#include "core/vec_scalar.hpp"
#include "cuda/tables.hpp"
#include "cuda/variable_numbers.hpp"

namespace adamax::cuda {

inline bool has_numbers(const Row& row) {
  return row.operation == Operation::kUpdate && !is_plain(storage_at(row.storage));
}
inline std::int64_t num_slabs(const Row& row) {
  return slab_of(row.first_element + row.size - 1) - slab_of(row.first_element) + 1;
}

// Null is what a program does not need.
struct Scratch {
  explicit Scratch(const Program& program, void* memory = nullptr) {
    std::size_t chunks = 0, floats = 0, doubles = 0;  // chunks of all levels; rows computed in each
    std::size_t slabs = 0;
    for (const Row& row : program.rows) {
      if (has_numbers(row)) slabs += num_slabs(row);
      (compute_dtype(row.param_dtype()) == DType::kFloat64 ? doubles : floats) += 1;
      if (!program.has_sums() || !row.is_summed) continue;
      ++num_sums;
      for (std::int64_t n = num_blocks(row.size); n > 1; n = num_blocks(n)) chunks += n;
    }
    const bool are_many = program.groups.size() > kFewGroups || program.has_device_scalars();
    const std::size_t many = are_many ? program.groups.size() : 0;
    const auto begin = reinterpret_cast<std::uintptr_t>(memory);
    std::uintptr_t end = begin;
    const auto take = [&end](std::size_t count, std::size_t size) {
      const std::uintptr_t taken = std::exchange(end, end + count * size);
      return count > 0 ? reinterpret_cast<void*>(taken) : nullptr;
    };
    // In falling order of alignment, so that nothing lies between them.
    numbers = static_cast<VariableNumbers*>(take(slabs, sizeof(VariableNumbers)));
    sums = static_cast<double*>(take(num_sums, sizeof(double)));
    clips = static_cast<double*>(
        take(program.clip.rule != ClipRule::kNone ? num_sums : 0, sizeof(double)));
    chunk_sums = static_cast<double*>(take(chunks, sizeof(double)));
    const bool has_steps = slabs > 0 && program.has_device_scalars();
    steps = static_cast<std::uint64_t*>(take(has_steps ? many : 0, sizeof(std::uint64_t)));
    double_groups = take(doubles > 0 ? many : 0, sizeof(GroupScalars<scalar::F64>));
    float_groups = take(floats > 0 ? many : 0, sizeof(GroupScalars<scalar::F32>));
    not_finite = static_cast<int*>(take(program.require_finite && num_sums > 0, sizeof(int)));
    vetoed = static_cast<int*>(take(program.loss_scale.found_inf != nullptr, sizeof(int)));
    bytes = end - begin;
  }

  std::size_t bytes;
  std::size_t num_sums = 0;
  VariableNumbers* numbers;            // of the rows that have them, in their order
  double* sums;                        // of the rows that are summed, in their order
  double* clips;                       // their coefficients
  double* chunk_sums;                  // of all levels
  std::uint64_t* steps;                // of the groups, where random numbers follow from them
  void *double_groups, *float_groups;  // where they are not few, or the device makes them
  int *not_finite, *vetoed;            // no program has both
};

}  // namespace adamax::cuda

// The scratch memory of a program: what lies where in it, and how much it is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "core/program.hpp"
#include "core/sum_shape.hpp"
#include "core/vec_scalar.hpp"
#include "cuda/tables.hpp"

namespace adamax::cuda {

// Null is what a program does not need.
struct Scratch {
  explicit Scratch(const Program& program, void* memory = nullptr) {
    std::size_t chunks = 0, floats = 0, doubles = 0;  // chunks of all levels; rows computed in each
    for (const Row& row : program.rows) {
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
    sums = static_cast<double*>(take(num_sums, sizeof(double)));
    clips = static_cast<double*>(
        take(program.clip.rule != ClipRule::kNone ? num_sums : 0, sizeof(double)));
    chunk_sums = static_cast<double*>(take(chunks, sizeof(double)));
    double_groups = take(doubles > 0 ? many : 0, sizeof(GroupScalars<scalar::F64>));
    float_groups = take(floats > 0 ? many : 0, sizeof(GroupScalars<scalar::F32>));
    not_finite = static_cast<int*>(take(program.require_finite && num_sums > 0, sizeof(int)));
    vetoed = static_cast<int*>(take(program.loss_scale.found_inf != nullptr, sizeof(int)));
    bytes = end - begin;
  }

  std::size_t bytes;
  std::size_t num_sums = 0;
  double* sums;                        // of the rows that are summed, in their order
  double* clips;                       // their coefficients
  double* chunk_sums;                  // of all levels
  void *double_groups, *float_groups;  // where they are not few, or the device makes them
  int *not_finite, *vetoed;            // no program has both
};

}  // namespace adamax::cuda

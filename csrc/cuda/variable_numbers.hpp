// The kernel that makes the numbers of variables that are not plain, before they are updated: keys
// of random numbers, and scales of norms in 16 bits.
//
// Once a variable, because keys take as many operations as two elements do; and because all blocks
// read a scale that is replaced.
#pragma once

#include <cstdint>

#include "adamax/dtypes.hpp"
#include "core/low_state.hpp"
#include "core/random.hpp"
#include "cuda/access.hpp"
#include "cuda/kernels.hpp"
#include "cuda/tables.hpp"

namespace adamax::cuda {

// Slabs of elements, each with its own keys, from the one of the first element on.
ADAMAX_HOST_DEVICE std::int64_t slab_of(std::int64_t element) { return element >> 33; }

struct NumbersRow {
  std::uint64_t seed, step;
  std::int64_t first_slab, last_slab;
  std::uint32_t number, group;
  float* norm_scale;  // of state in 16 bits; else null
  float beta_2;
  VariableNumbers* numbers;  // of each slab
};

// A thread has a variable.
template <bool is_small>
struct MakeNumbers {
  static constexpr const char* kName = "numbers";
  static constexpr int kThreads = 32;
  RowTable<NumbersRow, is_small> table;
  const std::uint64_t* steps;  // by group, where they lie in device memory; else null
  const int* veto;             // as in Elementwise

  std::uint32_t blocks() const { return (table.count + kThreads - 1) / kThreads; }

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    const std::uint32_t i = place.block * kThreads + place.thread;
    if (i >= table.count || (veto != nullptr && *veto != 0)) return;
    const NumbersRow& row = table.rows[i];
    VariableNumbers numbers{};
    if (row.norm_scale != nullptr) {
      scalar::F32 scale[1];  // at any address
      ByByte::load(row.norm_scale, scale);
      numbers.scale = scale[0].v;
      scale[0].v = next_variable_scale(scale[0].v, row.beta_2);
      ByByte::store(scale, row.norm_scale);
      numbers.inverse = 1.0f / scale[0].v;
    }
    const RandomSource source{row.seed, steps != nullptr ? steps[row.group] : row.step, row.number};
    for (std::int64_t slab = row.first_slab; slab <= row.last_slab; ++slab) {
      numbers.of_weights =
          random_keys(source, RandomStream::kWeights, static_cast<std::uint32_t>(slab));
      numbers.of_momentum =
          random_keys(source, RandomStream::kMomentum, static_cast<std::uint32_t>(slab / 2));
      row.numbers[slab - row.first_slab] = numbers;
    }
  }
};

}  // namespace adamax::cuda

// Tables that travel to the GPU as kernel arguments, and how a block finds its work in them.
//
// Pointers may change at every step; as arguments they need no copy to device memory of their own.
#pragma once

#include <cstdint>

#include "adamax/dtypes.hpp"
#include "core/host_device.hpp"
#include "core/random.hpp"
#include "core/update_rule.hpp"
#include "cuda/access.hpp"

namespace adamax::cuda {

// ---- Groups -------------------------------------------------------------------------------------

// What a group does, in one word: members of their own are loaded together and then taken apart,
// which ptxas does beside the loads of elements, and so waits.
class Rules {
 public:
  Rules() = default;
  ADAMAX_HOST_DEVICE explicit Rules(const Scalars& s)
      : word_(static_cast<std::uint32_t>(s.decay_rule) |
              static_cast<std::uint32_t>(s.epsilon_rule) << 2 |
              static_cast<std::uint32_t>(s.average_mode) << 3 |
              static_cast<std::uint32_t>(s.overwrite) << 5 |
              static_cast<std::uint32_t>(s.gradient_sign + 1) << 6) {}

  ADAMAX_HOST_DEVICE DecayRule decay() const { return static_cast<DecayRule>(word_ & 3); }
  ADAMAX_HOST_DEVICE EpsilonRule epsilon() const {
    return static_cast<EpsilonRule>(word_ >> 2 & 1);
  }
  ADAMAX_HOST_DEVICE AverageMode average() const {
    return static_cast<AverageMode>(word_ >> 3 & 3);
  }
  ADAMAX_HOST_DEVICE bool overwrites() const { return (word_ >> 5 & 1) != 0; }
  ADAMAX_HOST_DEVICE int gradient_sign() const { return static_cast<int>(word_ >> 6) - 1; }

 private:
  std::uint32_t word_;
};

// The scalars of a group, rounded to the type in which its rows are computed. `V` is a scalar::Vec.
template <class V>
struct GroupScalars {
  VectorScalars<V> scalars;
  Rules rules;

  GroupScalars() = default;
  ADAMAX_HOST_DEVICE explicit GroupScalars(const Scalars& s) : scalars(s, 1.0), rules(s) {}
};

// A few groups travel as arguments, more of them in device memory, as do those that the device
// makes itself: one launch has rows of any number of groups.
constexpr int kFewGroups = 16;

template <class V>
struct Groups {
  GroupScalars<V> few[kFewGroups];
  const GroupScalars<V>* many;  // in device memory; null: they are few

  // The argument; any of them where groups lie in device memory.
  ADAMAX_HOST_DEVICE GroupScalars<V> argument(std::uint32_t group) const {
    return few[many != nullptr ? 0 : group];
  }
  // The argument, or in its place what device memory has: beside loads of elements ptxas makes
  // loads of it that take place or not, for which no other waits. A choice of the two would be a
  // branch.
  ADAMAX_HOST_DEVICE GroupScalars<V> of(std::uint32_t group, GroupScalars<V> argument) const {
    if (many != nullptr) argument = many[group];
    return argument;
  }
};

// ---- Rows ---------------------------------------------------------------------------------------

// A row is a variable.
struct UpdateRow {
  std::int64_t size;  // elements
  std::uint32_t group;
  void* param;
  const void* grad;  // null beside an accumulator: a gradient of zero
  void* momentum;
  void* norm;
  void* average;
  void* accumulator;
  const double* clip;  // in device memory; null: 1
};

// What is beside it in a row that is not plain: numbers of the variable in this step, which a
// kernel makes before (variable_numbers.hpp), and what follows from them.
struct alignas(16) VariableNumbers {
  RandomKeys of_weights, of_momentum;
  float scale, inverse;  // of norms in 16 bits: as they are read; 1 / that of what is stored
};
struct TileRow : UpdateRow {
  WeightRounding rounding;
  void* remainder;
  float* norm_scale;               // of blocks in 8 bits; else null
  const VariableNumbers* numbers;  // in device memory: for each slab of random numbers
  std::int64_t first_element;
};

struct SumsRow {
  std::int64_t size;
  std::uint32_t group;
  const void* source;       // may be null, likewise
  const void* accumulator;  // added to the source; null in tables of kernels without it
  double* sums;             // one a chunk
};

// Of kernels with a thread for each row.
template <class TableRow, bool is_small>
struct RowTable {
  static constexpr int kCapacity = (is_small ? 3'584 : 31'000) / sizeof(TableRow);
  TableRow rows[kCapacity];
  std::uint32_t count = 0;

  void add(const TableRow& row) { rows[count++] = row; }
};

// Rows are cut into chunks of `chunk_size` elements, numbered through the table.
//
// Kernel arguments hold 32,764 bytes from CUDA 12.1 on, of which a few groups take up to 1,700. Few
// variables travel in a smaller table, because every launch copies all of it.
template <class TableRow, int chunk_size, bool is_small>
struct Table {
  static constexpr int kCapacity =
      (is_small ? 3'584 : 31'000) / (sizeof(TableRow) + sizeof(std::uint32_t));
  TableRow rows[kCapacity];
  std::uint32_t first_chunks[kCapacity];  // of each row; by themselves, because they are searched
  std::uint32_t count = 0;
  std::uint32_t chunks = 0;  // 2^32 chunks are more elements than any device holds

  void add(const TableRow& row) {
    rows[count] = row;
    first_chunks[count++] = chunks;
    chunks += static_cast<std::uint32_t>((row.size + chunk_size - 1) / chunk_size);
  }

  struct Piece {
    const TableRow& row;
    std::uint32_t chunk;  // of the row
    Stretch stretch;
  };

  ADAMAX_HOST_DEVICE Piece piece_of(std::uint32_t chunk) const {
    std::uint32_t low = 0, high = count;  // the row is in [low, high)
    while (high - low > 1) {
      const std::uint32_t middle = (low + high) / 2;
      (first_chunks[middle] <= chunk ? low : high) = middle;
    }
    const TableRow& row = rows[low];
    const std::uint32_t of_row = chunk - first_chunks[low];
    const std::int64_t begin = static_cast<std::int64_t>(of_row) * chunk_size;
    const std::int64_t rest = row.size - begin;
    return {row, of_row, {begin, rest < chunk_size ? static_cast<int>(rest) : chunk_size}};
  }
};

}  // namespace adamax::cuda

// Tables of variables that travel to the GPU as kernel arguments, and how a block finds its work.
//
// Pointers may change at every step; as arguments they need no copy to device memory of their own.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"
#include "core/sum_shape.hpp"
#include "core/update_rule.hpp"

namespace adamax::cuda {

// A row is a variable. It is cut into chunks of kBlock elements, numbered through the table.
struct UpdateRow {
  std::int64_t size;          // elements
  std::uint32_t first_chunk;  // set by Table::add
  DecayRule decay;
  void* param;
  const void* grad;
  void* momentum;
  void* norm;
  void* average;
  void* accumulator;
  const double* clip;  // in device memory; null: 1
};

struct SumsRow {
  std::int64_t size;
  std::uint32_t first_chunk;
  const void* source;
  const void* accumulator;  // added to the source; may be null
  double* sums;             // one a chunk
};

// Kernel arguments hold 32,764 bytes from CUDA 12.1 on; the scalars of a step need some 200. Few
// variables travel in a smaller table, because every launch copies all of it.
template <class Row, bool is_small>
struct Table {
  static constexpr int kCapacity = (is_small ? 3'584 : 32'256) / sizeof(Row);
  Row rows[kCapacity];
  std::uint32_t count = 0;
  std::uint32_t chunks = 0;  // 2^32 chunks are more elements than any device holds

  void add(Row row) {
    row.first_chunk = chunks;
    rows[count++] = row;
    chunks += static_cast<std::uint32_t>(num_blocks(row.size));
  }

  ADAMAX_HOST_DEVICE const Row& row_of(std::uint32_t chunk) const {
    std::uint32_t low = 0, high = count;  // the row begins in [low, high)
    while (high - low > 1) {
      const std::uint32_t middle = (low + high) / 2;
      (rows[middle].first_chunk <= chunk ? low : high) = middle;
    }
    return rows[low];
  }
};

// The elements of a row that a chunk stands for.
struct Stretch {
  std::int64_t begin, end;
};

template <class Row>
ADAMAX_HOST_DEVICE Stretch stretch_of(const Row& row, std::uint32_t chunk) {
  const std::int64_t begin = static_cast<std::int64_t>(chunk - row.first_chunk) * kBlock;
  return {begin, begin + kBlock < row.size ? begin + kBlock : row.size};
}

}  // namespace adamax::cuda

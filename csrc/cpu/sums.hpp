// Sums of squares of a program's rows, with a fixed shape, and the clip coefficients that follow.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/program.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/work.hpp"

namespace adamax::cpu {

class Sums {
 public:
  static std::size_t scratch_bytes(const Program& program);
  // Lays itself out in `scratch`, which may be null for a program without sums.
  Sums(const Program& program, void* scratch);

  // Sums the blocks of a piece; pieces may come from several threads.
  void add(const KernelTable& table, const Piece& piece);
  // When all pieces were added, from one thread: the sums of the rows, and the coefficients.
  void finish();

  double clip(std::size_t row) const { return clips_.empty() ? 1.0 : clips_[row]; }
  const Outcome& outcome() const { return outcome_; }

 private:
  const Program& program_;
  std::vector<std::int64_t> first_block_;        // of each row, in block_sums_
  std::span<double> rows_, clips_, block_sums_;  // a number a row, a row, and a block
  std::atomic<bool> is_finite_{true};
  Outcome outcome_;
};

}  // namespace adamax::cpu

// Sums of squares of a program's rows, with a fixed shape, and the clip coefficients that follow.
#include "cpu/sums.hpp"

#include <algorithm>
#include <cmath>

#include "core/clip_norm.hpp"
#include "core/sum_shape.hpp"

namespace adamax::cpu {
namespace {

// Reduces the sums of blocks by the scheme that made them, again, until one is left.
double fold_blocks(std::span<double> sums) {
  while (sums.size() > 1) {
    const std::size_t blocks = num_blocks(static_cast<std::int64_t>(sums.size()));
    for (std::size_t block = 0; block < blocks; ++block) {
      const std::size_t begin = block * kBlock, end = std::min(begin + kBlock, sums.size());
      double lanes[kLanes] = {};
      for (std::size_t e = begin; e < end; ++e) lanes[(e - begin) % kLanes] += sums[e];
      sums[block] = fold_lanes(lanes);
    }
    sums = sums.first(blocks);
  }
  return sums[0];
}

}  // namespace

std::size_t Sums::scratch_bytes(const Program& program) {
  if (!program.has_sums()) return 0;
  std::size_t numbers = 2 * program.rows.size();
  for (const Row& row : program.rows) numbers += num_blocks(row.size);
  return numbers * sizeof(double);
}

Sums::Sums(const Program& program, void* scratch) : program_(program) {
  if (!program.has_sums()) return;
  first_block_.reserve(program.rows.size());
  std::int64_t blocks = 0;
  for (const Row& row : program.rows) {
    first_block_.push_back(blocks);
    blocks += num_blocks(row.size);
  }
  double* const numbers = static_cast<double*>(scratch);
  const std::size_t rows = program.rows.size();
  rows_ = {numbers, rows};
  clips_ = {numbers + rows, rows};
  block_sums_ = {numbers + 2 * rows, static_cast<std::size_t>(blocks)};
}

void Sums::add(const KernelTable& table, const Piece& piece) {
  const Row& row = program_.rows[piece.row];
  if (!row.is_summed) return;
  Arrays memory = row.memory;
  if (!program_.sums_accumulators) memory.accumulator = nullptr;
  double* const sums = &block_sums_[first_block_[piece.row] + piece.begin / kBlock];
  const auto squares = table.squares[static_cast<int>(row.grad_dtype())][program_.require_finite];
  if (!squares(memory, piece.begin, piece.end, program_.groups[row.group], sums)) {
    is_finite_.store(false, std::memory_order_relaxed);
  }
}

void Sums::finish() {
  double total = 0.0;
  for (std::size_t i = 0; i < program_.rows.size(); ++i) {
    const Row& row = program_.rows[i];
    rows_[i] = row.is_summed
                   ? fold_blocks(block_sums_.subspan(first_block_[i], num_blocks(row.size)))
                   : 0.0;
    total += rows_[i];
    if (program_.clip.rule == ClipRule::kNorm) {
      clips_[i] = clip_by_norm(program_.clip.limit, rows_[i]);
    }
  }
  if (program_.clip.rule != ClipRule::kNorm) {
    const bool clips = program_.clip.rule == ClipRule::kGlobalNorm;
    std::fill(clips_.begin(), clips_.end(),
              clips ? clip_by_global_norm(program_.clip.limit, total) : 1.0);
  }
  outcome_ = {is_finite_.load(std::memory_order_relaxed), std::sqrt(total)};
}

}  // namespace adamax::cpu

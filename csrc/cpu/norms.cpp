// Sums of squares with a fixed shape: the same bits for any thread count and instruction set.
#include "cpu/norms.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/clip_norm.hpp"

namespace adamax::cpu {

double fold_blocks(std::span<double> sums) {
  if (sums.empty()) return 0.0;
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

void clip_coefficients(const Hyperparameters& h, std::span<const Variable> variables,
                       std::span<const double> sums_of_squares, std::span<double> coefficients) {
  if (h.clipnorm) {
    for (std::size_t i = 0; i < variables.size(); ++i) {
      coefficients[i] = clip_by_norm(*h.clipnorm, sums_of_squares[i]);
    }
  } else if (h.global_clipnorm) {
    double total = 0.0;
    for (std::size_t i = 0; i < variables.size(); ++i) {
      if (variables[i].grad != nullptr) total += sums_of_squares[i];
    }
    std::fill(coefficients.begin(), coefficients.end(),
              clip_by_global_norm(*h.global_clipnorm, total));
  }
}

bool only_sum_overflowed(const Variable& variable) {
  if (variable.grad_dtype != DType::kFloat64) return false;
  const char* const grad = static_cast<const char*>(variable.grad);
  for (std::int64_t i = 0; i < variable.size; ++i) {
    double value;
    std::memcpy(&value, grad + i * sizeof(double), sizeof(double));
    if (!std::isfinite(value)) return false;
  }
  return true;
}

}  // namespace adamax::cpu

// Coefficients of clipping by norm, from sums of squares.
#pragma once

#include <cmath>

#include "core/host_device.hpp"

namespace adamax {

// Scales one gradient to at most `limit`; NaN for a norm that is NaN.
ADAMAX_HOST_DEVICE double clip_by_norm(double limit, double sum_of_squares) {
  const double norm = sqrt(sum_of_squares);
  return limit / (norm > limit || norm != norm ? norm : limit);
}

// Scales all gradients together; NaN for a norm that is not finite, so that a poisoned step is
// seen.
ADAMAX_HOST_DEVICE double clip_by_global_norm(double limit, double sum_of_squares) {
  const double norm = sqrt(sum_of_squares);
  if (!(norm - norm == 0)) return norm - norm;
  const double coefficient = limit / norm;
  return coefficient < 1.0 ? coefficient : 1.0;
}

}  // namespace adamax

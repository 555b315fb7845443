// 1 - beta^step from plain double operations: the same bits with any C library, and on a GPU.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"

namespace adamax {

// An unevaluated sum of two doubles.
struct DoubleDouble {
  double high, low;
};

// Exact: Dekker 1971, without a fused operation.
ADAMAX_HOST_DEVICE DoubleDouble two_product(double a, double b) {
  const double product = a * b;
  double split = 134217729.0 * a;
  const double a_high = split - (split - a);
  split = 134217729.0 * b;
  const double b_high = split - (split - b);
  const double a_low = a - a_high, b_low = b - b_high;
  return {product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low};
}

ADAMAX_HOST_DEVICE DoubleDouble multiply(DoubleDouble x, DoubleDouble y) {
  const DoubleDouble product = two_product(x.high, y.high);
  const double low = product.low + (x.high * y.low + x.low * y.high);
  const double total = product.high + low;
  return {total, low - (total - product.high)};
}

// Repeated squaring, lowest bit of `step` first; a running product over the steps would drift. Ends
// as soon as the power no longer shows beside 1.
ADAMAX_HOST_DEVICE double bias_correction(double beta, std::int64_t step) {
  constexpr double kNothing = 0x1p-60;
  DoubleDouble power{1.0, 0.0}, square{beta, 0.0};
  while (step != 0) {
    if ((step & 1) != 0) {
      power = multiply(power, square);
      if (power.high < kNothing) return 1.0;
    }
    step >>= 1;
    if (step != 0) {
      square = multiply(square, square);
      if (square.high < kNothing) return 1.0;  // a higher bit of step is set: it will be a factor
    }
  }
  const double whole = 1.0 - power.high;
  return whole + (((1.0 - whole) - power.high) - power.low);
}

}  // namespace adamax

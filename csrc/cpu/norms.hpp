// Sums of squares with a fixed shape: the same bits for any thread count and instruction set.
#pragma once

#include <cstdint>
#include <span>

#include "adamax/adamax.hpp"
#include "core/sum_shape.hpp"

namespace adamax::cpu {

// Reduces the sums of a variable's blocks by the scheme that made them, again, until one is left.
// Uses `sums` as its workspace; 0 for none.
double fold_blocks(std::span<double> sums);

// Coefficients c of clipping by norm, one a variable, from the sums of squares of each variable.
// Variables without a gradient are left out of the global norm.
void clip_coefficients(const Hyperparameters& hyperparameters, std::span<const Variable> variables,
                       std::span<const double> sums_of_squares, std::span<double> coefficients);

// Whether every element of the gradient is finite although its sum of squares is not, which
// overflow does to float64 alone.
bool only_sum_overflowed(const Variable& variable);

}  // namespace adamax::cpu

// The arrays that are kept for a variable: their import, and whether they are there and fit.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string_view>

#include "adamax/adamax.hpp"
#include "bindings/buffer.hpp"

namespace adamax::bindings {

// In the order of their import: the first tells the format of the state.
enum class Kept : std::uint8_t {
  kMomentum,
  kNorm,
  kAverage,
  kAccumulator,
  kNormScale,
  kRemainder,
};
constexpr int kNumKept = 6;
constexpr std::array<std::string_view, kNumKept> kKeptNames = {
    "momentum", "norm", "average", "gradient_accumulator", "norm_scale", "remainder"};

// Imports what is kept for `param`, after those of kinds before, and notes it in `variable`, whose
// rounding is known. False: there is none, and null is noted. Throws ValueError for one that is
// None but needed, or the other way round, and TypeError or ValueError for one that does not fit.
bool import_kept(Kept kind, py::handle object, const Label& label, const Buffer& param,
                 const Label& param_label, Variable& variable, Leases& leases, Buffer& buffer);

}  // namespace adamax::bindings

// Names of the dtypes, and what is supported.
#include "adamax/dtypes.hpp"

#include <algorithm>

#include "adamax/adamax.hpp"

namespace adamax {

std::string_view dtype_name(DType dtype) {
  constexpr std::string_view kNames[] = {"float32", "float64", "float16", "bfloat16"};
  return kNames[static_cast<int>(dtype)];
}

DType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

bool is_supported(DTypePair pair) {
  return std::any_of(std::begin(kPairs), std::end(kPairs), [pair](DTypePair known) {
    return known.param == pair.param && known.grad == pair.grad;
  });
}

}  // namespace adamax

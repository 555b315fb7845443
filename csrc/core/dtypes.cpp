// Names of the dtypes.
#include "adamax/dtypes.hpp"

#include "adamax/adamax.hpp"

namespace adamax {

std::string_view dtype_name(DType dtype) {
  constexpr std::string_view kNames[] = {"float32", "float64", "float16", "bfloat16",
                                         "int8",    "uint8",   "int16",   "uint16"};
  return kNames[static_cast<int>(dtype)];
}

}  // namespace adamax

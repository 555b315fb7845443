// Storage types, and the visible list of what is stored in which of them.
//
// Plain data only: kernel units include this file under their own instruction-set flags.
#pragma once

#include <cstdint>

namespace adamax {

enum class DType : std::uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
constexpr int kNumDTypes = 4;

// Sixteen bits in memory; arithmetic is done in float32.
struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// The C++ type that holds one element of a dtype, and the type in which it is computed.
template <DType>
struct TypeOf;
template <>
struct TypeOf<DType::kFloat32> {
  using Stored = float;
  using Compute = float;
};
template <>
struct TypeOf<DType::kFloat64> {
  using Stored = double;
  using Compute = double;
};
template <>
struct TypeOf<DType::kFloat16> {
  using Stored = Float16;
  using Compute = float;
};
template <>
struct TypeOf<DType::kBFloat16> {
  using Stored = BFloat16;
  using Compute = float;
};

// How a variable lies in memory. `state` is that of the first moment, the infinity norm, the
// average and the accumulator.
struct Storage {
  DType param;
  DType grad;
  DType state;

  bool operator==(const Storage&) const = default;
};

// Every accepted combination. Kernels and error messages are generated from this list.
constexpr Storage kStorages[] = {
    {DType::kFloat32, DType::kFloat32, DType::kFloat32},
    {DType::kFloat32, DType::kFloat16, DType::kFloat32},
    {DType::kFloat32, DType::kBFloat16, DType::kFloat32},
    {DType::kFloat64, DType::kFloat64, DType::kFloat64},
    {DType::kFloat16, DType::kFloat16, DType::kFloat32},
    {DType::kFloat16, DType::kFloat32, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16, DType::kFloat32},
    {DType::kBFloat16, DType::kFloat32, DType::kFloat32},
};
constexpr int kNumStorages = sizeof(kStorages) / sizeof(kStorages[0]);

}  // namespace adamax

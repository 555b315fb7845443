// Storage types and the visible list of (parameter, gradient) pairs.
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
  using Storage = float;
  using Compute = float;
};
template <>
struct TypeOf<DType::kFloat64> {
  using Storage = double;
  using Compute = double;
};
template <>
struct TypeOf<DType::kFloat16> {
  using Storage = Float16;
  using Compute = float;
};
template <>
struct TypeOf<DType::kBFloat16> {
  using Storage = BFloat16;
  using Compute = float;
};

struct DTypePair {
  DType param;
  DType grad;
};

// Every accepted combination. Kernels and error messages are generated from this list.
constexpr DTypePair kPairs[] = {
    {DType::kFloat32, DType::kFloat32},   {DType::kFloat32, DType::kFloat16},
    {DType::kFloat32, DType::kBFloat16},  {DType::kFloat64, DType::kFloat64},
    {DType::kFloat16, DType::kFloat16},   {DType::kFloat16, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32},
};
constexpr int kNumPairs = sizeof(kPairs) / sizeof(kPairs[0]);

}  // namespace adamax

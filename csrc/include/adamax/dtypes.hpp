// Storage types, and the visible list of what is stored in which of them.
//
// Plain data only: kernel units include this file under their own instruction-set flags.
#pragma once

#include <cstdint>

namespace adamax {

enum class DType : std::uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  // Only for state that is kept in fewer bits: codes, remainders, and bfloat16 as its bits.
  kInt8,
  kUInt8,
  kInt16,
  kUInt16,
};
constexpr int kNumDTypes = 4;  // of parameters and gradients: those that come first

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

// The type in which a parameter of that type is computed, and in which its state is kept if that is
// not to be smaller.
constexpr DType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// How the first moment and the infinity norm lie in memory. Average and accumulator are always of
// the type in which a variable is computed.
enum class StateFormat : std::uint8_t {
  kFull,    // in the type in which the variable is computed
  k16Bits,  // bfloat16, with one scale a variable
  k8Bits,   // codes, with one scale for each block of kStateBlock elements
};
constexpr int kNumStateFormats = 3;
constexpr std::int64_t kStateBlock = 256;

// The C++ types that hold one element of the state of a variable that is computed in float32.
template <StateFormat>
struct StateOf {
  using Momentum = float;
  using Norm = float;
};
template <>
struct StateOf<StateFormat::k16Bits> {
  using Momentum = BFloat16;
  using Norm = BFloat16;
};
template <>
struct StateOf<StateFormat::k8Bits> {
  using Momentum = std::int8_t;
  using Norm = std::uint8_t;
};

// Of norms that are not full.
constexpr std::int64_t number_of_scales(std::int64_t size, StateFormat format) {
  return format == StateFormat::k16Bits ? 1 : (size + kStateBlock - 1) / kStateBlock;
}

// What becomes of the bits of a weight that bfloat16 has no room for.
enum class WeightRounding : std::uint8_t {
  kNearest,     // lost, and with them every step that is small beside the weight
  kStochastic,  // they are the probability with which the weight is rounded away from zero
  kRemainder,   // kept in an array of 16 bits beside it
};
constexpr int kNumWeightRoundings = 3;

struct Storage {
  DType param{};
  DType grad{};
  StateFormat state = StateFormat::kFull;
  WeightRounding rounding = WeightRounding::kNearest;

  bool operator==(const Storage&) const = default;
};

struct DTypePair {
  DType param, grad;
};
// Every accepted pair of dtypes. Kernels and error messages are generated from this list.
constexpr DTypePair kPairs[] = {
    {DType::kFloat32, DType::kFloat32},   {DType::kFloat32, DType::kFloat16},
    {DType::kFloat32, DType::kBFloat16},  {DType::kFloat64, DType::kFloat64},
    {DType::kFloat16, DType::kFloat16},   {DType::kFloat16, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32},
};
constexpr int kNumPairs = sizeof(kPairs) / sizeof(kPairs[0]);

// Each pair with each format and rounding, those that do not exist among them.
constexpr int kNumStorages = kNumPairs * kNumStateFormats * kNumWeightRoundings;
struct StorageTable {
  Storage storages[kNumStorages];

  constexpr StorageTable() : storages{} {
    for (int i = 0; i < kNumStorages; ++i) {
      const DTypePair pair = kPairs[i / kNumWeightRoundings / kNumStateFormats];
      storages[i] = {pair.param, pair.grad,
                     static_cast<StateFormat>(i / kNumWeightRoundings % kNumStateFormats),
                     static_cast<WeightRounding>(i % kNumWeightRoundings)};
    }
  }
};
inline constexpr StorageTable kStorageTable;
constexpr const Storage& storage_at(int index) { return kStorageTable.storages[index]; }
constexpr bool exists(const Storage& storage) {
  if (storage.param == DType::kFloat64 && storage.state != StateFormat::kFull) return false;
  return storage.rounding == WeightRounding::kNearest || storage.param == DType::kBFloat16;
}
// What takes no random numbers, no scales and no remainder: the step is the formula and nothing
// else.
constexpr bool is_plain(const Storage& storage) {
  return storage.state == StateFormat::kFull && storage.rounding == WeightRounding::kNearest;
}

}  // namespace adamax

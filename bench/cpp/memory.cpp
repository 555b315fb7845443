// The memory that a benchmark works on: variables with all their streams, filled with usual values.
#include "memory.hpp"

#include <bit>
#include <cstring>
#include <new>
#include <random>
#include <utility>

namespace adamax_bench {
namespace {

using adamax::DType;

// A value as a dtype stores it; the 16-bit types cut off instead of rounding.
template <class T>
T converted(DType dtype, double value);
template <>
float converted<float>(DType, double value) {
  return static_cast<float>(value);
}
template <>
double converted<double>(DType, double value) {
  return value;
}
template <>
std::uint16_t converted<std::uint16_t>(DType dtype, double value) {
  const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
  if (dtype == DType::kBFloat16) return static_cast<std::uint16_t>(bits >> 16);
  if ((bits & 0x7fffffff) == 0) return static_cast<std::uint16_t>(bits >> 16);
  // Right for the normal numbers of float16: 2^-14 and more.
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000) |
                                    (((bits >> 13) - (112 << 10)) & 0x7fff));
}

// Of the first moment and the infinity norm.
std::pair<DType, DType> state_dtypes(const adamax::Storage& storage) {
  switch (storage.state) {
    case adamax::StateFormat::kFull:
      break;
    case adamax::StateFormat::k16Bits:
      return {DType::kBFloat16, DType::kBFloat16};
    case adamax::StateFormat::k8Bits:
      return {DType::kInt8, DType::kUInt8};
  }
  const DType computed = adamax::compute_dtype(storage.param);
  return {computed, computed};
}

template <class T>
void fill_random(T* p, DType dtype, std::int64_t elements, double low, double high) {
  constexpr std::int64_t kPeriod = 4099;  // a prime: no variable sees the same values
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<T> values;
  for (int i = 0; i < kPeriod; ++i) values.push_back(converted<T>(dtype, uniform(random)));
  for (std::int64_t i = 0; i < elements; ++i) p[i] = values[i % kPeriod];
}

}  // namespace

void Memory::Block::allocate(DType type, std::int64_t elements) {
  dtype = type;
  // Whole pages, as large NumPy and torch allocations get them.
  const std::size_t bytes = elements * adamax::itemsize(type);
  data.reset(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
  if (data == nullptr) throw std::bad_alloc();
}

void Memory::Block::fill(std::int64_t elements, double low, double high) {
  if (dtype == DType::kFloat32) {
    fill_random(static_cast<float*>(data.get()), dtype, elements, low, high);
  } else if (dtype == DType::kFloat64) {
    fill_random(static_cast<double*>(data.get()), dtype, elements, low, high);
  } else if (adamax::itemsize(dtype) == 1) {
    std::memset(data.get(), 0, elements);
  } else {
    fill_random(static_cast<std::uint16_t*>(data.get()), dtype, elements, low, high);
  }
}

bound_stream Memory::Block::stream(bool written) const {
  return {data.get(), static_cast<std::int32_t>(adamax::itemsize(dtype)), written};
}

Memory::Memory(std::span<const std::int64_t> sizes, const Streams& streams) {
  for (const std::int64_t size : sizes) elements_ += size;
  const DType state = adamax::compute_dtype(streams.storage.param);
  const auto [momentum, norm] = state_dtypes(streams.storage);
  param_.allocate(streams.storage.param, elements_);
  grad_.allocate(streams.storage.grad, elements_);
  momentum_.allocate(momentum, elements_);
  norm_.allocate(norm, elements_);
  if (streams.storage.rounding == adamax::WeightRounding::kRemainder) {
    remainder_.allocate(DType::kInt16, elements_);
    remainder_.fill(elements_, 0.0, 0.0);
  }
  // A scale for each block, and for the begin of each variable.
  norm_scale_.assign(elements_ / adamax::kStateBlock + sizes.size(), 1.0f);
  if (streams.average) average_.allocate(state, elements_);
  if (streams.accumulator) accumulator_.allocate(state, elements_);
  param_.fill(elements_, -1.0, 1.0);
  grad_.fill(elements_, -1.0, 1.0);
  fill_state(0.0, 1.0);
  if (streams.average) average_.fill(elements_, -1.0, 1.0);
  if (streams.accumulator) accumulator_.fill(elements_, -1.0, 1.0);

  std::int64_t begin = 0, block = 0;
  for (const std::int64_t size : sizes) {
    const auto at = [begin](const Block& block) {
      char* const data = static_cast<char*>(block.data.get());
      return data == nullptr ? nullptr : data + begin * adamax::itemsize(block.dtype);
    };
    variables_.push_back({{at(param_), at(grad_), at(momentum_), at(norm_), at(average_),
                           at(accumulator_), norm_scale_.data() + block, at(remainder_)},
                          size,
                          streams.storage});
    begin += size;
    block += number_of_scales(size, adamax::StateFormat::k8Bits);
  }
}

// Codes are what they are at zero, where a step takes the same time.
void Memory::fill_state(double momentum, double norm) {
  momentum_.fill(elements_, -momentum, momentum);
  norm_.fill(elements_, norm / 2, norm);
}

void Memory::fill_gradients(double value) { grad_.fill(elements_, -value, value); }

std::vector<bound_stream> Memory::step_streams() const {
  std::vector<bound_stream> streams{param_.stream(true), grad_.stream(false),
                                    momentum_.stream(true), norm_.stream(true)};
  if (remainder_.data) streams.push_back(remainder_.stream(true));
  if (average_.data) streams.push_back(average_.stream(true));
  if (accumulator_.data) streams.push_back(accumulator_.stream(true));
  return streams;
}

std::vector<bound_stream> Memory::norm_streams() const { return {grad_.stream(false)}; }

std::vector<bound_stream> Memory::accumulate_streams() const {
  return {accumulator_.stream(true), grad_.stream(false)};
}

}  // namespace adamax_bench

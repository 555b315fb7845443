// The public C++ API: variables in groups, and one call that does a training step on all of them.
//
// The formula, its order and its bits are those of the README's "What is promised"; the rules for
// memory are these: every array of a variable has the same element count, any alignment is
// accepted, and no two written arrays overlap. The caller keeps the memory alive for the duration
// of the call. cuda.hpp has the same call for memory of a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "adamax/arrays.hpp"
#include "adamax/device_scalars.hpp"
#include "adamax/dtypes.hpp"
#include "adamax/rules.hpp"

namespace adamax {

// The settings that variables share. Variables with other settings or another step number are in
// other groups of the same call.
struct Group {
  double learning_rate = 0.001;  // below 0 it ascends, and schedules of torch end there
  double beta_1 = 0.9;
  double beta_2 = 0.999;
  double epsilon = 1e-7;  // > 0; also 0 with EpsilonRule::kInside
  double weight_decay = 0.0;
  DecayRule decay = DecayRule::kDecoupled;
  EpsilonRule epsilon_rule = EpsilonRule::kOutside;
  std::optional<double> clipvalue = std::nullopt;  // limits each element of the gradient
  double ema_momentum = 0.99;
  std::int64_t step = 1;      // number of this update, from 1
  bool maximize = false;      // ascend
  std::uint64_t seed = 0;     // of the random numbers of rounding: the same seed, the same bits
  DeviceScalars device = {};  // numbers in the memory of a GPU: cuda.hpp
};

enum class ClipRule : std::uint8_t {
  kNone,
  kNorm,        // limits the norm of each variable's gradient
  kGlobalNorm,  // limits the norm over all gradients together
};
struct Clip {
  ClipRule rule = ClipRule::kNone;
  double limit = 0.0;
};

enum class Phase : std::uint8_t {
  kAccumulate,  // add the gradients to the accumulators, and nothing else
  kUpdate,
  kFinalize,  // write the averages over the weights, and nothing else
};

// What one call does with all variables.
struct Call {
  double grad_scale = 1.0;  // multiplies every gradient; NaN makes all weights NaN
  Clip clip = {};           // not together with a group's clipvalue
  std::int64_t micro_batches = 1;
  Phase phase = Phase::kUpdate;
  bool overwrite = false;       // replace the weights by their averages after the update
  bool require_finite = false;  // change nothing if a gradient is infinite or NaN
  DeviceLossScale device = {};  // numbers in the memory of a GPU: cuda.hpp
};

// Make one with `variable()`.
struct Variable {
  Arrays memory;
  std::int64_t size;  // elements
  Storage storage;
  std::uint32_t group = 0;  // index into the groups of the call
  // Its accumulator holds gradients of earlier micro-batches: an update without a gradient is then
  // one with a gradient of zero.
  bool has_accumulated = false;
  // For random numbers: a number that tells the variable from others with the same seed, and, where
  // this is a part of one, the element of it with which the part begins, a multiple of kStateBlock.
  std::uint32_t number = 0;
  std::int64_t first_element = 0;
};

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<T, double>) return DType::kFloat64;
  if constexpr (std::is_same_v<T, Float16>) return DType::kFloat16;
  if constexpr (std::is_same_v<T, BFloat16>) return DType::kBFloat16;
}

template <class P>
using state_t = std::conditional_t<std::is_same_v<P, double>, double, float>;

namespace detail {

inline void check_size(const char* name, std::size_t size, std::size_t expected,
                       bool is_optional = false) {
  if (size == expected || (is_optional && size == 0)) return;
  throw std::invalid_argument(std::string(name) + " must have " + std::to_string(expected) +
                              " elements; received " + std::to_string(size));
}

template <class P, class G, class M, class U>
Variable variable(StateFormat format, std::span<P> param, std::span<G> grad, std::span<M> momentum,
                  std::span<U> norm, std::span<state_t<P>> average,
                  std::span<state_t<P>> accumulator) {
  check_size("grad", grad.size(), param.size(), true);
  check_size("momentum", momentum.size(), param.size());
  check_size("norm", norm.size(), param.size());
  check_size("average", average.size(), param.size(), true);
  check_size("accumulator", accumulator.size(), param.size(), true);
  const auto or_null = [](auto span) { return span.empty() ? nullptr : span.data(); };
  return {{param.data(), or_null(grad), momentum.data(), norm.data(), or_null(average),
           or_null(accumulator)},
          static_cast<std::int64_t>(param.size()),
          {dtype_of<P>(), dtype_of<std::remove_const_t<G>>(), format}};
}

}  // namespace detail

// Throws std::invalid_argument when the element counts do not fit. `grad` may be empty to skip the
// variable, `average` and `accumulator` may be empty when they are not used.
template <class P, class G>
Variable variable(std::span<P> param, std::span<G> grad, std::span<state_t<P>> momentum,
                  std::span<state_t<P>> norm, std::span<state_t<P>> average = {},
                  std::span<state_t<P>> accumulator = {}) {
  return detail::variable(StateFormat::kFull, param, grad, momentum, norm, average, accumulator);
}

// State in fewer bits, for any parameter but one of doubles. Before the first step it is zero, but
// for the scale of State16, which is 1.
struct State16 {
  std::span<BFloat16> momentum, norm;
  std::span<float> norm_scale;  // one
};
struct State8 {
  std::span<std::int8_t> momentum;
  std::span<std::uint8_t> norm;
  std::span<float> norm_scale;  // one for each kStateBlock elements, the last of which may be fewer
};

template <class P, class G>
Variable variable(std::span<P> param, std::span<G> grad, const State16& state,
                  std::span<float> average = {}, std::span<float> accumulator = {}) {
  Variable v = detail::variable(StateFormat::k16Bits, param, grad, state.momentum, state.norm,
                                average, accumulator);
  detail::check_size("norm_scale", state.norm_scale.size(), 1);
  v.memory.norm_scale = state.norm_scale.data();
  return v;
}
template <class P, class G>
Variable variable(std::span<P> param, std::span<G> grad, const State8& state,
                  std::span<float> average = {}, std::span<float> accumulator = {}) {
  Variable v = detail::variable(StateFormat::k8Bits, param, grad, state.momentum, state.norm,
                                average, accumulator);
  detail::check_size("norm_scale", state.norm_scale.size(),
                     number_of_scales(v.size, StateFormat::k8Bits));
  v.memory.norm_scale = state.norm_scale.data();
  return v;
}

// The same variable, of bfloat16: its weights rounded at random, or with an array for what they do
// not hold, zero before the first step.
inline Variable with_stochastic_rounding(Variable v) {
  v.storage.rounding = WeightRounding::kStochastic;
  return v;
}
inline Variable with_remainder(Variable v, std::span<std::int16_t> remainder) {
  detail::check_size("remainder", remainder.size(), static_cast<std::size_t>(v.size));
  v.memory.remainder = remainder.data();
  v.storage.rounding = WeightRounding::kRemainder;
  return v;
}

// Does one training step in place, all groups together. Returns false, with nothing changed, if
// `require_finite` was asked for and a gradient is not finite. Throws std::invalid_argument, before
// anything is written, for a setting out of range or lost in the type in which a variable is
// computed, an unsupported storage, or a missing array.
bool step(std::span<const Variable> variables, std::span<const Group> groups,
          const Call& call = {});
// With one group for all variables.
inline bool step(std::span<const Variable> variables, const Group& group, const Call& call = {}) {
  return step(variables, std::span(&group, 1), call);
}

struct ConstBuffer {
  DType dtype;
  std::int64_t size;  // elements
  const void* data;
};

// The Euclidean norm over all buffers together; infinite or NaN if an element is.
double global_norm(std::span<const ConstBuffer> buffers);

// State in fewer bits, as float32 and back. `memory` has momentum, norm and norm_scale, all in host
// memory; `epsilon` is that of a group with EpsilonRule::kOutside, else 0, and matters for 8 bits
// alone. What is stored is rounded to nearest, with the largest norm of a block as its scale: from
// codes to float32 and back is within one rounding. kFull copies float32.
void decode_state(StateFormat format, const Arrays& memory, std::int64_t size, double epsilon,
                  float* momentum, float* norm);
void encode_state(StateFormat format, const Arrays& memory, std::int64_t size, double epsilon,
                  const float* momentum, const float* norm);
// Weights with a remainder, as the float32 numbers that they stand for, and back.
void join_weights(const BFloat16* weights, const std::int16_t* remainders, std::int64_t size,
                  float* joined);
void split_weights(const float* joined, std::int64_t size, BFloat16* weights,
                   std::int16_t* remainders);

// Instruction sets that this processor runs, best last; the one in use. The environment variable
// ADAMAX_EXT_ISA (one of the list, or "auto") decides at first use; a wrong value throws
// std::invalid_argument.
std::vector<std::string> available_isas();
std::string active_isa();

// Threads for large steps: at most `n`, the processors of the affinity mask, the cgroup's quota,
// and what an OpenMP runtime in the process is limited to. Without a call,
// ADAMAX_EXT_NUM_THREADS, then OMP_NUM_THREADS, stand for `n`.
void set_num_threads(int n);
int get_num_threads();

std::string_view dtype_name(DType dtype);
namespace detail {
inline constexpr std::size_t kItemSizes[] = {4, 8, 2, 2, 1, 1, 2, 2};
}
// Bytes of an element in memory.
constexpr std::size_t itemsize(DType dtype) { return detail::kItemSizes[static_cast<int>(dtype)]; }

}  // namespace adamax

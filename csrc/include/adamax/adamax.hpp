// The public C++ API: variables, hyperparameters, and one call that does a training step on all of
// them.
//
// The formula, its order and its bits are those of the README's "What is promised"; the rules for
// memory are these: every array of a variable has the same element count, any alignment is
// accepted, and no two written arrays overlap. The caller keeps the memory alive for the duration
// of the call.
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

#include "adamax/dtypes.hpp"

namespace adamax {

enum class Decay {
  kDecoupled,  // w = w - w * (learning_rate * weight_decay), as in Keras
  kL2,         // gradient = gradient + w * weight_decay, as in torch
};
enum class EpsilonMode {
  kOutside,  // w - rate * m / (u + epsilon), as in Keras
  kInside,   // u = max(beta_2 * u, |gradient| + epsilon), as in torch and optax
};

struct Hyperparameters {
  double learning_rate = 0.001;
  double beta_1 = 0.9;
  double beta_2 = 0.999;
  double epsilon = 1e-7;
  double weight_decay = 0.0;
  Decay decay = Decay::kDecoupled;
  EpsilonMode epsilon_mode = EpsilonMode::kOutside;
  // At most one of the three.
  std::optional<double> clipnorm = std::nullopt;         // per variable
  std::optional<double> global_clipnorm = std::nullopt;  // over all variables
  std::optional<double> clipvalue = std::nullopt;        // per element
  double ema_momentum = 0.99;
  std::int64_t gradient_accumulation_steps = 1;
};

// What one call does.
struct Call {
  std::int64_t step = 1;         // number of this update, from 1
  double grad_scale = 1.0;       // multiplies every gradient
  double loss_scale = 1.0;       // divides every gradient
  bool accumulate_only = false;  // add the gradients to the accumulators, and nothing else
  bool overwrite = false;        // replace the weights by their averages at the end
  bool require_finite = false;   // change nothing if a gradient is infinite or NaN
};

// The memory of one variable, with the types erased. Make one with `variable()`.
struct Variable {
  DType param_dtype;
  DType grad_dtype;
  std::int64_t size;  // elements
  void* param;
  const void* grad;  // null: skipped, but its average is updated
  void* momentum;
  void* norm;
  void* average = nullptr;      // null: no average is kept
  void* accumulator = nullptr;  // needed when gradient_accumulation_steps > 1
  bool decays = true;           // false: excluded from weight decay
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

// Throws std::invalid_argument when the element counts differ. `grad` may be empty to skip the
// variable, `average` and `accumulator` may be empty when they are not used.
template <class P, class G>
Variable variable(std::span<P> param, std::span<G> grad, std::span<state_t<P>> momentum,
                  std::span<state_t<P>> norm, std::span<state_t<P>> average = {},
                  std::span<state_t<P>> accumulator = {}) {
  const auto check = [&](const char* name, std::size_t size, bool optional) {
    if (size != param.size() && !(optional && size == 0)) {
      throw std::invalid_argument(std::string(name) + " must have the " +
                                  std::to_string(param.size()) + " elements of param; received " +
                                  std::to_string(size));
    }
  };
  check("grad", grad.size(), true);
  check("momentum", momentum.size(), false);
  check("norm", norm.size(), false);
  check("average", average.size(), true);
  check("accumulator", accumulator.size(), true);
  return {dtype_of<P>(),
          dtype_of<std::remove_const_t<G>>(),
          static_cast<std::int64_t>(param.size()),
          param.data(),
          grad.empty() ? nullptr : grad.data(),
          momentum.data(),
          norm.data(),
          average.empty() ? nullptr : average.data(),
          accumulator.empty() ? nullptr : accumulator.data()};
}

// Does one training step in place. Returns false, with nothing changed, if `require_finite` was
// asked for and a gradient is not finite. Throws std::invalid_argument, before anything is written,
// for a setting out of range, an unsupported pair of types or a missing array.
bool step(std::span<const Variable> variables, const Hyperparameters& hyperparameters,
          const Call& call);

// Writes every average over its weights.
void overwrite_with_averages(std::span<const Variable> variables);

struct ConstBuffer {
  DType dtype;
  std::int64_t size;  // elements
  const void* data;
};

// The Euclidean norm over all buffers together; infinite or NaN if an element is.
double global_norm(std::span<const ConstBuffer> buffers);

// Instruction sets that this processor runs, best last; the one in use. The environment variable
// ADAMAX_EXT_ISA (one of the list, or "auto") decides at first use; a wrong value throws
// std::invalid_argument.
std::vector<std::string> available_isas();
std::string active_isa();

// Threads for large steps: at most `n`, the processors of the affinity mask and the cgroup's quota.
// Without a call, ADAMAX_EXT_NUM_THREADS, then OMP_NUM_THREADS, stand for `n`.
void set_num_threads(int n);
int get_num_threads();

std::string_view dtype_name(DType dtype);
// Bytes of an element in memory.
constexpr std::size_t itemsize(DType dtype) {
  constexpr std::size_t kSizes[] = {4, 8, 2, 2};
  return kSizes[static_cast<int>(dtype)];
}
DType compute_dtype(DType dtype);
bool is_supported(DTypePair pair);

}  // namespace adamax

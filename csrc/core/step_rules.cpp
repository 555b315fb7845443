// What a call does to a variable, by its settings: the decisions that every device shares.
#include "core/step_rules.hpp"

namespace adamax {

int pair_index(const Variable& variable) {
  for (int i = 0; i < kNumPairs; ++i) {
    if (kPairs[i].param == variable.param_dtype && kPairs[i].grad == variable.grad_dtype) return i;
  }
  throw std::invalid_argument("no kernel for " + std::string(dtype_name(variable.param_dtype)) +
                              " parameters with " + std::string(dtype_name(variable.grad_dtype)) +
                              " gradients");
}

void require_memory(const Variable& v, const Hyperparameters& h, const Call& call) {
  const auto require = [&v](bool valid, const char* what) {
    if (!valid && v.size > 0) throw std::invalid_argument(what);
  };
  require(v.param != nullptr && v.momentum != nullptr && v.norm != nullptr,
          "a variable must have memory for param, momentum and norm");
  require(v.accumulator != nullptr || !(averages_micro_batches(h) || call.accumulate_only),
          "a variable must have an accumulator when gradients are accumulated");
  require(v.average != nullptr || !call.overwrite,
          "a variable must have an average to be overwritten with it");
}

Rule rule_of(const Variable& v, const Hyperparameters& h) {
  const DecayRule decay = h.weight_decay == 0 || !v.decays ? DecayRule::kNone
                          : h.decay == Decay::kL2          ? DecayRule::kL2
                                                           : DecayRule::kDecoupled;
  const EpsilonRule epsilon =
      h.epsilon_mode == EpsilonMode::kInside ? EpsilonRule::kInside : EpsilonRule::kOutside;
  return {decay, epsilon, v.average != nullptr, averages_micro_batches(h)};
}

}  // namespace adamax

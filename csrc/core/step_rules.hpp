// What a call does to a variable, by its settings: the decisions that every device shares.
#pragma once

#include "adamax/adamax.hpp"
#include "core/update_rule.hpp"

namespace adamax {

// Position of the variable's types in kPairs; throws std::invalid_argument if they are not there.
int pair_index(const Variable& variable);

// Throws std::invalid_argument if the variable lacks memory that the call needs.
void require_memory(const Variable& variable, const Hyperparameters& h, const Call& call);

inline bool averages_micro_batches(const Hyperparameters& h) {
  return h.gradient_accumulation_steps > 1;
}

inline bool clips_by_norm(const Hyperparameters& h, const Call& call) {
  return !call.accumulate_only && (h.clipnorm || h.global_clipnorm);
}

Rule rule_of(const Variable& variable, const Hyperparameters& h);

}  // namespace adamax

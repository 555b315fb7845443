// Where the arrays of one variable lie.
//
// Plain data only: kernel units include this file under their own instruction-set flags.
#pragma once

namespace adamax {

// The memory of one variable, with the types erased. Null is what is not there.
struct Arrays {
  void* param = nullptr;
  const void* grad = nullptr;  // null: skipped, but the average is updated
  void* momentum = nullptr;
  void* norm = nullptr;
  void* average = nullptr;      // null: no average is kept
  void* accumulator = nullptr;  // needed when micro_batches > 1
  float* norm_scale = nullptr;  // with state in fewer bits: number_of_scales()
  void* remainder = nullptr;    // int16, with WeightRounding::kRemainder

  bool operator==(const Arrays&) const = default;
};

}  // namespace adamax

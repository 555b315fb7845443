// The table of compiled loops that each instruction set exports, and what they take.
//
// Plain data only: kernel units include this file under their own instruction-set flags.
#pragma once

#include <cstdint>

#include "adamax/dtypes.hpp"
#include "core/step_scalars.hpp"
#include "core/sum_shape.hpp"
#include "core/update_rule.hpp"

namespace adamax::cpu {

// The memory of one variable; every array has the variable's element count. Unused streams are
// null.
struct Streams {
  void* param;
  const void* grad;
  void* momentum;
  void* norm;
  void* average;
  void* accumulator;
};

// Each works on elements [begin, end). `clip` is the variable's clip-by-norm coefficient.
using UpdateKernel = void (*)(const Streams&, std::int64_t begin, std::int64_t end,
                              const StepScalars&, double clip);
// accumulator += grad * grad_scale
using AccumulateKernel = void (*)(const Streams&, std::int64_t begin, std::int64_t end,
                                  const StepScalars&);
// The average alone, for variables without a gradient.
using AverageKernel = void (*)(const Streams&, std::int64_t begin, std::int64_t end,
                               const StepScalars&);
// Sums of squares of the unscaled (with an accumulator: averaged) gradient, one a block.
// `begin` is a multiple of kBlock.
using SquaresKernel = void (*)(const Streams&, std::int64_t begin, std::int64_t end,
                               const StepScalars&, double* block_sums);

struct KernelTable {
  const char* isa;
  UpdateKernel update[kNumPairs][kNumRules];
  AccumulateKernel accumulate[kNumDTypes];  // by the gradient's dtype
  SquaresKernel squares[kNumDTypes];        // by the gradient's dtype
  AverageKernel average[kNumDTypes];        // by the parameter's dtype
};

// One a unit; only those compiled for this processor family exist.
namespace scalar {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}

}  // namespace adamax::cpu

// The table of compiled loops that each instruction set exports, and what they take.
//
// Plain data only: kernel units include this file under their own instruction-set flags.
#pragma once

#include <cstdint>

#include "adamax/arrays.hpp"
#include "adamax/dtypes.hpp"
#include "core/scalars.hpp"
#include "core/sum_shape.hpp"

namespace adamax::cpu {

// Each works on elements [begin, end) of one variable. `clip` is its clip-by-norm coefficient, and
// memory is prefetched `ahead` bytes early.
using Kernel = void (*)(const Arrays&, std::int64_t begin, std::int64_t end, const Scalars&,
                        double clip, std::int64_t ahead);

// Sums of squares of the unscaled gradient (averaged, if there is an accumulator), one a block.
// `begin` is a multiple of kBlock. Returns whether every element of the gradient as it is passed is
// finite; true if nobody asked.
using SquaresKernel = bool (*)(const Arrays&, std::int64_t begin, std::int64_t end, const Scalars&,
                               double* block_sums);

struct KernelTable {
  const char* isa;
  const char* features;  // of the processor that its code needs, separated by spaces
  // A loop is compiled for each set of memory streams; the rules are a switch above the loop.
  Kernel update[kNumStorages][2][2];     // without and with an average, an accumulator
  Kernel accumulate[kNumDTypes];         // by the gradient's dtype
  Kernel average[kNumDTypes];            // by the parameter's dtype
  SquaresKernel squares[kNumDTypes][2];  // by the gradient's dtype; whether finiteness is asked for
};

}  // namespace adamax::cpu

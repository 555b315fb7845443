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

// Bytes by which memory is prefetched early. From 64 to 8192 were measured: in caches 384 is best
// (on Zen 5 2048 takes up to 27 % longer at 2^20 elements), in memory 2048 (on Zen 5 4 to 12 % less
// time); a stream alone, as that of a norm, gains nothing from more.
constexpr std::int64_t kAheadInCaches = 384, kAheadInMemory = 2048;

// Elements [begin, end) of a variable, and what else a loop is told.
struct Slice {
  std::int64_t begin, end;
  double clip = 1.0;  // the coefficient of clipping by norm
  std::int64_t ahead = kAheadInCaches;
  // For random numbers: which variable it is, and where in it element 0 lies.
  std::uint32_t variable = 0;
  std::int64_t first_element = 0;
};

using Kernel = void (*)(const Arrays&, const Scalars&, const Slice&);

// Sums of squares of the unscaled gradient (averaged, if there is an accumulator), one a block.
// `begin` is a multiple of kBlock. Returns whether every element of the gradient as it is passed is
// finite; true if nobody asked.
using SquaresKernel = bool (*)(const Arrays&, std::int64_t begin, std::int64_t end, const Scalars&,
                               double* block_sums);

struct KernelTable {
  const char* isa;
  const char* features;  // of the processor that its code needs, separated by spaces
  // A loop is compiled for each set of memory streams; the rules are a switch above the loop. Null
  // where a storage does not exist. One that is not plain works in tiles, and begins at a multiple
  // of kStateBlock.
  Kernel update[kNumStorages][2][2];     // without and with an average, an accumulator
  Kernel accumulate[kNumDTypes];         // by the gradient's dtype
  Kernel average[kNumDTypes][2];         // by the parameter's dtype; whether it has a remainder
  SquaresKernel squares[kNumDTypes][2];  // by the gradient's dtype; whether finiteness is asked for
};

}  // namespace adamax::cpu

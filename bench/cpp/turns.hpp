// Times an action beside the fastest way of making the passes of its bound, in turns.
#pragma once

#include <benchmark/benchmark.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "bound.hpp"

namespace adamax_bench {

using Action = std::function<void()>;

// Of an action, the mean of so many times in a row.
double seconds(const Action& action, int times);
double quantile(std::vector<double> values, double q);

// Reports `action` per element, and as a share of the bound.
void report(benchmark::State& state, std::int64_t elements, int threads,
            const std::vector<std::vector<bound_stream>>& passes, const Action& action);

}  // namespace adamax_bench

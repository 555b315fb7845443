// Times an action beside the fastest way of making the passes of its bound, in turns.
#include "turns.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>

namespace adamax_bench {
double seconds(const Action& action, int times) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < times; ++i) action();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / times;
}

double quantile(std::vector<double> values, double q) {
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(q * (values.size() - 1) + 0.5);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

namespace {

// Times every action once a round (small ones many times over), until there are enough rounds.
std::vector<std::vector<double>> in_turns(const std::vector<Action>& actions) {
  constexpr double kTurnSeconds = 200e-6, kTotalSeconds = 0.6;
  constexpr int kLeastRounds = 9;
  std::vector<std::vector<double>> times(actions.size());
  for (const Action& action : actions) action();
  const int repeats = std::max(1, static_cast<int>(kTurnSeconds / seconds(actions[0], 1)));
  double total = 0;
  for (int round = 0; round < kLeastRounds || total < kTotalSeconds; ++round) {
    for (std::size_t i = 0; i < actions.size(); ++i) {
      actions[i]();  // the caches are as this action leaves them
      times[i].push_back(seconds(actions[i], repeats));
      total += times[i].back() * repeats;
    }
  }
  return times;
}

}  // namespace

void report(benchmark::State& state, std::int64_t elements, int threads,
            const std::vector<std::vector<bound_stream>>& passes, const Action& action) {
  std::vector<Action> actions{action};
  for (int variant = 0; variant < bound_variants(); ++variant) {
    actions.push_back([&passes, elements, threads, variant] {
      for (const auto& streams : passes) {
        if (!bound_pass(streams.data(), static_cast<int>(streams.size()), elements / 64 * 64,
                        threads, variant)) {
          std::abort();  // a benchmark asks for a shape that bound.cpp does not list
        }
      }
    });
  }
  double bytes_per_element = 0;
  for (const auto& streams : passes) {
    for (const bound_stream& s : streams)
      bytes_per_element += s.bytes_per_element * (1 + s.written);
  }
  std::vector<std::vector<double>> times;
  for (auto _ : state) {
    times = in_turns(actions);
    state.SetIterationTime(quantile(times[0], 0.5));
  }
  const auto& best = *std::min_element(times.begin() + 1, times.end(), [](auto& a, auto& b) {
    return quantile(a, 0.5) < quantile(b, 0.5);
  });
  std::vector<double> fractions;
  for (std::size_t round = 0; round < best.size(); ++round) {
    fractions.push_back(best[round] / times[0][round]);
  }
  const double median = quantile(times[0], 0.5);
  state.counters["ns_per_element"] = 1e9 * median / elements;
  state.counters["bytes_per_second"] = bytes_per_element * elements / median;
  state.counters["fraction_of_bound"] = quantile(fractions, 0.5);
  state.counters["fraction_low"] = quantile(fractions, 0.25);
  state.counters["fraction_high"] = quantile(fractions, 0.75);
  state.counters["rounds"] = static_cast<double>(best.size());
}

}  // namespace adamax_bench

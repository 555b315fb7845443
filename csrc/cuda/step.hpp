// A step on a GPU: which kernels are launched, in which order, with which tables.
//
// `Device` launches them on one stream: device.cu has the real one, a test an emulated one.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include "adamax/adamax.hpp"
#include "core/step_rules.hpp"
#include "core/step_scalars.hpp"
#include "cpu/fp_mode.hpp"
#include "cuda/kernels.hpp"

namespace adamax::cuda {

// Launches `make(is_small)` with all rows, in as many launches as its table needs.
template <class Device, class Row, class Make>
void launch_rows(Device& device, std::span<const Row> rows, const Make& make) {
  while (!rows.empty()) {
    const auto launch = [&](auto is_small) {
      auto kernel = make(is_small);
      const auto count = std::min<std::size_t>(rows.size(), kernel.table.kCapacity);
      for (const Row& row : rows.first(count)) kernel.table.add(row);
      device.launch(kernel);
      rows = rows.subspan(count);
    };
    if (rows.size() <= Table<Row, true>::kCapacity) {
      launch(std::true_type{});
    } else {
      launch(std::false_type{});
    }
  }
}

// The sums of squares of some gradients, in device memory, one after the other.
class SumsOfSquares {
 public:
  struct Source {
    DType dtype;
    std::int64_t size;
    const void* data;
    const void* accumulator;
  };

  // How many doubles they need: the results, then the chunk sums of every level.
  static std::size_t workspace(std::span<const Source> sources) {
    std::int64_t count = static_cast<std::int64_t>(sources.size());
    for (const Source& source : sources) {
      for (std::int64_t n = num_blocks(source.size); n > 1; n = num_blocks(n)) count += n;
    }
    return static_cast<std::size_t>(count);
  }

  // Queues the reductions; the results are the first numbers of `memory`. `not_finite` may be null.
  template <class Device>
  static void launch(Device& device, std::span<const Source> sources, const StepScalars& scalars,
                     int* not_finite, double* memory) {
    double* free = memory + sources.size();
    std::array<std::vector<SumsRow>, kNumDTypes> first;
    std::vector<SumsRow> next;
    // Where the sums of the chunks of a row go; queues what adds them.
    const auto sums_for = [&](std::int64_t size, double* result, std::vector<SumsRow>& later) {
      const std::int64_t chunks = num_blocks(size);
      if (chunks <= 1) return result;
      double* const sums = std::exchange(free, free + chunks);
      later.push_back({chunks, 0, sums, nullptr, result});
      return sums;
    };
    for (std::size_t i = 0; i < sources.size(); ++i) {
      const Source& s = sources[i];
      double* const sums = sums_for(s.size, memory + i, next);
      first[static_cast<int>(s.dtype)].push_back({s.size, 0, s.data, s.accumulator, sums});
    }
    launch_level<DType::kFloat32, true>(device, first[0], scalars, not_finite);
    launch_level<DType::kFloat64, true>(device, first[1], scalars, not_finite);
    launch_level<DType::kFloat16, true>(device, first[2], scalars, not_finite);
    launch_level<DType::kBFloat16, true>(device, first[3], scalars, not_finite);
    while (!next.empty()) {
      std::vector<SumsRow> later;
      for (SumsRow& row : next) row.sums = sums_for(row.size, row.sums, later);
      launch_level<DType::kFloat64, false>(device, next, scalars, nullptr);
      next = std::move(later);
    }
  }

 private:
  template <DType dtype, bool squares, class Device>
  static void launch_level(Device& device, const std::vector<SumsRow>& rows,
                           const StepScalars& scalars, int* not_finite) {
    launch_rows(device, std::span(rows), [&](auto is_small) {
      using Kernel = Sums<dtype, squares, is_small>;
      return Kernel{{}, {scalars, 1.0}, not_finite};
    });
  }
};

// What the elementwise kernels of a call have in common, and their rows, by what is compiled apart.
struct Elements {
  StepScalars scalars;
  EpsilonRule epsilon;
  const int* veto;
  std::array<std::vector<UpdateRow>, kNumPairs * 4> updates;  // by pair, average, accumulator
  std::array<std::vector<UpdateRow>, kNumDTypes> accumulations, lone_averages;

  template <class Device>
  void launch(Device& device) const {
    launch_updates(device, std::make_integer_sequence<int, kNumPairs * 4>{});
    launch_others(device, std::make_integer_sequence<int, kNumDTypes>{});
  }

 private:
  template <class Device, int... k>
  void launch_updates(Device& device, std::integer_sequence<int, k...>) const {
    (launch_update<k>(device), ...);
  }
  template <class Device, int... k>
  void launch_others(Device& device, std::integer_sequence<int, k...>) const {
    (launch_other<static_cast<DType>(k)>(device), ...);
  }

  template <int k, class Device>
  void launch_update(Device& device) const {
    launch_rows(device, std::span(updates[k]), [this](auto is_small) {
      using Kernel = Update<k / 4, k / 2 % 2 == 1, k % 2 == 1, is_small>;
      return Kernel{{{}, {scalars, 1.0}, veto}, epsilon, scalars.average_mode, scalars.overwrite};
    });
  }
  template <DType dtype, class Device>
  void launch_other(Device& device) const {
    launch_rows(device, std::span(accumulations[static_cast<int>(dtype)]), [this](auto is_small) {
      return Accumulate<dtype, is_small>{{{}, {scalars, 1.0}, veto}};
    });
    launch_rows(device, std::span(lone_averages[static_cast<int>(dtype)]), [this](auto is_small) {
      using Kernel = Average<dtype, is_small>;
      return Kernel{{{}, {scalars, 1.0}, veto}, scalars.average_mode, scalars.overwrite};
    });
  }
};

// Throws as adamax::step does.
template <class Device>
bool step(Device& device, std::span<const Variable> variables, const Hyperparameters& h,
          const Call& call) {
  const cpu::FloatingPointMode ieee;
  Elements elements{
      make_step_scalars(h, call),
      h.epsilon_mode == EpsilonMode::kInside ? EpsilonRule::kInside : EpsilonRule::kOutside,
      nullptr,
      {},
      {},
      {}};
  std::vector<int> pairs;
  for (const Variable& v : variables) {
    pairs.push_back(pair_index(v));
    require_memory(v, h, call);
  }
  const bool clips = clips_by_norm(h, call);

  // Sums of squares of the variables that have a gradient; empty ones add nothing.
  std::vector<const double*> clip_of(variables.size(), nullptr);
  if (clips || call.require_finite) {
    std::vector<SumsOfSquares::Source> sources;
    const bool averages = averages_micro_batches(h) && !call.accumulate_only;
    for (const Variable& v : variables) {
      if (v.grad == nullptr || v.size == 0) continue;
      sources.push_back({v.grad_dtype, v.size, v.grad, averages ? v.accumulator : nullptr});
    }
    const std::size_t sums = SumsOfSquares::workspace(sources);
    double* const memory = device.reserve(sums + sources.size());
    int* const not_finite = call.require_finite ? device.cleared_flag() : nullptr;
    elements.veto = not_finite;
    SumsOfSquares::launch(device, std::span<const SumsOfSquares::Source>(sources), elements.scalars,
                          not_finite, memory);
    if (clips && !sources.empty()) {
      double* const coefficients = memory + sums;
      device.launch(Clip{memory, coefficients, static_cast<int>(sources.size()),
                         h.clipnorm ? *h.clipnorm : *h.global_clipnorm,
                         h.global_clipnorm.has_value()});
      const double* next = coefficients;
      for (std::size_t i = 0; i < variables.size(); ++i) {
        if (variables[i].grad == nullptr || variables[i].size == 0) continue;
        clip_of[i] = h.clipnorm ? next++ : coefficients;
      }
    }
    if (call.require_finite) device.request_flag();
  }

  for (std::size_t i = 0; i < variables.size(); ++i) {
    const Variable& v = variables[i];
    if (v.size == 0) continue;
    const Rule rule = rule_of(v, h);
    const UpdateRow row{v.size,     0,      rule.decay, v.param,       v.grad,
                        v.momentum, v.norm, v.average,  v.accumulator, clip_of[i]};
    if (call.accumulate_only) {
      if (v.grad != nullptr) {
        elements.accumulations[static_cast<int>(v.grad_dtype)].push_back(row);
      }
    } else if (v.grad != nullptr) {
      elements.updates[4 * pairs[i] + 2 * rule.average + rule.accumulator].push_back(row);
    } else if (v.average != nullptr) {
      elements.lone_averages[static_cast<int>(v.param_dtype)].push_back(row);
    }
  }
  elements.launch(device);
  return !call.require_finite || device.awaited_flag() == 0;
}

template <class Device>
void overwrite_with_averages(Device& device, std::span<const Variable> variables) {
  Elements elements{};
  elements.scalars.average_mode = AverageMode::kKeep;
  elements.scalars.overwrite = true;
  for (const Variable& v : variables) {
    if (v.average == nullptr || v.size == 0) continue;
    UpdateRow row{};
    row.size = v.size;
    row.param = v.param;
    row.average = v.average;
    elements.lone_averages[static_cast<int>(v.param_dtype)].push_back(row);
  }
  elements.launch(device);
}

template <class Device>
double global_norm(Device& device, std::span<const ConstBuffer> buffers) {
  const cpu::FloatingPointMode ieee;
  std::vector<SumsOfSquares::Source> sources;
  for (const ConstBuffer& b : buffers) {
    if (b.size > 0) sources.push_back({b.dtype, b.size, b.data, nullptr});
  }
  double* const memory = device.reserve(SumsOfSquares::workspace(sources));
  SumsOfSquares::launch(device, std::span<const SumsOfSquares::Source>(sources), StepScalars{},
                        nullptr, memory);
  std::vector<double> sums(sources.size());
  device.copy(sums.data(), memory, sums.size() * sizeof(double));
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

}  // namespace adamax::cuda

// How a GPU runs a program: which kernels are launched, in which order, with which tables.
//
// `Device` launches them on the stream of a queue: device.cu has the real one, a test an emulated
// one (tests/cpp/emulated_cuda.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include "core/backend.hpp"
#include "core/fp_mode.hpp"
#include "cuda/device_groups.hpp"
#include "cuda/kernels.hpp"
#include "cuda/norms.hpp"
#include "cuda/scratch.hpp"
#include "cuda/tiles.hpp"
#include "cuda/variable_numbers.hpp"

namespace adamax::cuda {

template <class Device>
class Run {
 public:
  Run(Device& device, const Program& program, const Workspace& workspace)
      : device_(device),
        program_(program),
        scratch_(program, workspace.memory),
        last_use_(scratch_.bytes > 0 ? workspace.last_use : nullptr) {}

  Outcome outcome() {
    if (last_use_ != nullptr) device_.wait_for(last_use_);
    if (program_.has_device_scalars()) {
      make_groups();
    } else {
      set_groups(float_groups_, scratch_.float_groups);
      set_groups(double_groups_, scratch_.double_groups);
    }
    if (scratch_.num_sums > 0) sum();
    sort_rows();
    if (scratch_.numbers != nullptr) make_numbers();
    [this]<int... k>(std::integer_sequence<int, k...>) {
      (launch_updates<k>(), ...);
    }(std::make_integer_sequence<int, kNumStorages>{});
    [this]<int... k>(std::integer_sequence<int, k...>) {
      (launch_tile_updates<k>(), ...);
    }(std::make_integer_sequence<int, kNumPairs>{});
    [this]<int... k>(std::integer_sequence<int, k...>) {
      (launch_others<static_cast<DType>(k)>(), ...);
    }(std::make_integer_sequence<int, kNumDTypes>{});
    // At once, while the stream exists: its owner may destroy it before the next program comes.
    if (last_use_ != nullptr) device_.note(last_use_);
    Outcome outcome;
    if (scratch_.not_finite != nullptr) outcome.is_finite = device_.awaited_flag() == 0;
    if (program_.wants_norm) outcome.norm = norm();
    return outcome;
  }

 private:
  // ---- Groups -----------------------------------------------------------------------------------

  // `memory` is null where no row is computed in V, or groups are few.
  template <class V>
  void set_groups(Groups<V>& groups, void* memory) {
    const std::vector<GroupScalars<V>> rounded(program_.groups.begin(), program_.groups.end());
    if (rounded.size() <= kFewGroups) {
      std::copy(rounded.begin(), rounded.end(), groups.few);
    } else if (memory != nullptr) {
      device_.upload(memory, rounded.data(), rounded.size() * sizeof(rounded[0]));
      groups.many = static_cast<const GroupScalars<V>*>(memory);
    }
  }
  // Of what device memory has when the kernel runs: nothing of it is known here, nothing is
  // uploaded.
  void make_groups() {
    auto* const floats = static_cast<GroupScalars<scalar::F32>*>(scratch_.float_groups);
    auto* const doubles = static_cast<GroupScalars<scalar::F64>*>(scratch_.double_groups);
    float_groups_.many = floats;
    double_groups_.many = doubles;
    std::vector<GroupRow> rows;
    rows.reserve(program_.groups.size());
    for (std::uint32_t i = 0; i < program_.groups.size(); ++i) {
      rows.push_back({program_.groups[i], program_.device_groups[i], i});
    }
    launch_rows(std::span<const GroupRow>(rows), [&](auto is_small) {
      return MakeGroups<is_small>{{},
                                  floats,
                                  doubles,
                                  scratch_.steps,
                                  program_.loss_scale,
                                  scratch_.vetoed,
                                  program_.counts_steps};
    });
  }
  const Groups<scalar::F32>& groups_of(scalar::F32) const { return float_groups_; }
  const Groups<scalar::F64>& groups_of(scalar::F64) const { return double_groups_; }

  // Launches `make(is_small)` with all rows, in as many launches as its table needs.
  template <class TableRow, class Make>
  void launch_rows(std::span<const TableRow> rows, const Make& make) {
    while (!rows.empty()) {
      const auto launch = [&](auto is_small) {
        auto kernel = make(is_small);
        const auto count = std::min<std::size_t>(rows.size(), kernel.table.kCapacity);
        for (const TableRow& row : rows.first(count)) kernel.table.add(row);
        device_.launch(kernel);
        rows = rows.subspan(count);
      };
      if (rows.size() <= decltype(make(std::true_type{}).table)::kCapacity) {
        launch(std::true_type{});
      } else {
        launch(std::false_type{});
      }
    }
  }

  // ---- Sums -------------------------------------------------------------------------------------

  // Queues the reductions, and what is made of them.
  void sum() {
    if (scratch_.not_finite != nullptr) device_.clear(scratch_.not_finite);
    double *result = scratch_.sums, *free = scratch_.chunk_sums;
    std::vector<SumsRow> first[kNumDTypes];
    std::vector<SumsRow> next;
    // Where the sums of the chunks of a row go; queues what adds them.
    const auto sums_for = [&](std::int64_t size, double* total, std::vector<SumsRow>& later) {
      const std::int64_t chunks = num_blocks(size);
      if (chunks <= 1) return total;
      double* const sums = std::exchange(free, free + chunks);
      later.push_back({chunks, 0, sums, nullptr, total});
      return sums;
    };
    for (const Row& row : program_.rows) {
      if (!row.is_summed) continue;
      const void* const added = program_.sums_accumulators ? row.memory.accumulator : nullptr;
      double* const sums = sums_for(row.size, result++, next);
      first[static_cast<int>(row.grad_dtype())].push_back(
          {row.size, row.group, row.memory.grad, added, sums});
    }
    program_.sums_accumulators ? launch_squares<true>(first) : launch_squares<false>(first);
    while (!next.empty()) {
      std::vector<SumsRow> later;
      for (SumsRow& row : next) row.sums = sums_for(row.size, row.sums, later);
      launch_rows(std::span<const SumsRow>(next),
                  [](auto is_small) { return Sums<DType::kFloat64, false, false, is_small>{}; });
      next = std::move(later);
    }
    if (program_.clip.rule != ClipRule::kNone) {
      device_.launch(Clip{scratch_.sums, scratch_.clips,
                          static_cast<std::int64_t>(scratch_.num_sums), program_.clip.limit,
                          program_.clip.rule == ClipRule::kGlobalNorm});
    }
    if (scratch_.not_finite != nullptr) device_.request(scratch_.not_finite);
  }

  template <bool has_accumulator>
  void launch_squares(const std::vector<SumsRow> (&rows)[kNumDTypes]) {
    [&]<int... k>(std::integer_sequence<int, k...>) {
      (launch_squares<static_cast<DType>(k), has_accumulator>(rows[k]), ...);
    }(std::make_integer_sequence<int, kNumDTypes>{});
  }
  template <DType dtype, bool has_accumulator>
  void launch_squares(const std::vector<SumsRow>& rows) {
    launch_rows(std::span(rows), [this](auto is_small) {
      return Sums<dtype, true, has_accumulator, is_small>{
          {}, groups_of(Vector<dtype>()), scratch_.not_finite};
    });
  }

  double norm() {
    std::vector<double> sums(scratch_.num_sums);
    if (!sums.empty()) device_.copy(sums.data(), scratch_.sums, sums.size() * sizeof(double));
    double total = 0.0;
    for (const double sum : sums) total += sum;
    return std::sqrt(total);
  }

  // ---- Elements ---------------------------------------------------------------------------------

  const int* veto() const {
    return scratch_.vetoed != nullptr ? scratch_.vetoed : scratch_.not_finite;
  }

  void sort_rows() {
    const double* next_clip = scratch_.clips;  // of the rows that are summed
    const VariableNumbers* next_numbers = scratch_.numbers;
    for (const Row& row : program_.rows) {
      const double* const clip = row.is_summed ? next_clip : nullptr;
      if (row.is_summed && program_.clip.rule == ClipRule::kNorm) ++next_clip;
      const Arrays& m = row.memory;
      const Storage storage = storage_at(row.storage);
      const UpdateRow update{row.size, row.group, m.param,       m.grad, m.momentum,
                             m.norm,   m.average, m.accumulator, clip};
      const auto tile = [&](const VariableNumbers* numbers) {
        float* const scales = storage.state == StateFormat::k8Bits ? m.norm_scale : nullptr;
        return TileRow{update, storage.rounding, m.remainder, scales, numbers, row.first_element};
      };
      switch (row.operation) {
        case Operation::kNone:
          break;
        case Operation::kUpdate:
          if (has_numbers(row)) {
            tile_updates_[pair_of(row)][static_cast<int>(storage.state)].push_back(
                tile(std::exchange(next_numbers, next_numbers + num_slabs(row))));
          } else {
            updates_[row.storage][m.average != nullptr][m.accumulator != nullptr].push_back(update);
          }
          break;
        case Operation::kAccumulate:
          accumulations_[static_cast<int>(storage.grad)].push_back(update);
          break;
        case Operation::kAverage:
          if (storage.rounding == WeightRounding::kRemainder) {
            joined_averages_.push_back(tile(nullptr));
          } else {
            averages_[static_cast<int>(storage.param)].push_back(update);
          }
      }
    }
  }
  static int pair_of(const Row& row) {
    return row.storage / kNumWeightRoundings / kNumStateFormats;
  }

  // Of all rows that have some.
  void make_numbers() {
    std::vector<NumbersRow> rows;
    VariableNumbers* next = scratch_.numbers;
    for (const Row& row : program_.rows) {
      if (!has_numbers(row)) continue;
      const Scalars& s = program_.groups[row.group];
      const std::int64_t first = row.first_element;
      const bool has_scale = storage_at(row.storage).state == StateFormat::k16Bits;
      rows.push_back({s.seed, s.step, slab_of(first), slab_of(first + row.size - 1), row.number,
                      row.group, has_scale ? row.memory.norm_scale : nullptr,
                      static_cast<float>(s.beta_2), next});
      next += num_slabs(row);
    }
    launch_rows(std::span<const NumbersRow>(rows), [this](auto is_small) {
      return MakeNumbers<is_small>{{}, scratch_.steps, veto()};
    });
  }

  template <int storage>
  void launch_updates() {
    if constexpr (is_plain(storage_at(storage)) && exists(storage_at(storage))) {
      launch_update<storage, false, false>();
      launch_update<storage, false, true>();
      launch_update<storage, true, false>();
      launch_update<storage, true, true>();
    }
  }
  template <int storage, bool has_average, bool has_accumulator>
  void launch_update() {
    launch_elementwise<Vector<storage_at(storage).param>>(
        updates_[storage][has_average][has_accumulator],
        [](auto is_small) { return Update<storage, has_average, has_accumulator, is_small>{}; });
  }
  template <int pair>
  void launch_tile_updates() {
    [this]<int... k>(std::integer_sequence<int, k...>) {
      (launch_tile_update<pair, static_cast<StateFormat>(k)>(), ...);
    }(std::make_integer_sequence<int, kNumStateFormats>{});
  }
  template <int pair, StateFormat state>
  void launch_tile_update() {
    // In full state only what is not rounded to nearest.
    constexpr Storage kStorage{
        kPairs[pair].param, kPairs[pair].grad, state,
        state == StateFormat::kFull ? WeightRounding::kStochastic : WeightRounding::kNearest};
    if constexpr (exists(kStorage)) {
      launch_elementwise<scalar::F32>(
          tile_updates_[pair][static_cast<int>(state)],
          [](auto is_small) { return TileUpdate<pair, state, is_small>{}; });
    }
  }
  template <DType dtype>
  void launch_others() {
    constexpr int kIndex = static_cast<int>(dtype);
    launch_elementwise<Vector<dtype>>(accumulations_[kIndex],
                                      [](auto is_small) { return Accumulate<dtype, is_small>{}; });
    launch_elementwise<Vector<dtype>>(
        averages_[kIndex], [](auto is_small) { return Average<dtype, false, is_small>{}; });
    if constexpr (dtype == DType::kBFloat16) {
      launch_elementwise<Vector<dtype>>(
          joined_averages_, [](auto is_small) { return Average<dtype, true, is_small>{}; });
    }
  }
  template <class V, class TableRow, class Make>
  void launch_elementwise(const std::vector<TableRow>& rows, const Make& make) {
    launch_rows(std::span(rows), [&](auto is_small) {
      auto kernel = make(is_small);
      kernel.groups = groups_of(V());
      kernel.veto = veto();
      return kernel;
    });
  }

  Device& device_;
  const Program& program_;
  const Scratch scratch_;
  void* const last_use_;  // null also where no scratch memory is used
  Groups<scalar::F32> float_groups_{};
  Groups<scalar::F64> double_groups_{};
  std::vector<UpdateRow> updates_[kNumStorages][2][2];  // by average, accumulator
  std::vector<TileRow> tile_updates_[kNumPairs][kNumStateFormats], joined_averages_;
  std::vector<UpdateRow> accumulations_[kNumDTypes], averages_[kNumDTypes];
};

// `Device` is constructed on a queue; finish() is its end.
template <class Device>
Backend make_backend() {
  return {
      .require_usable = Device::require_usable,
      .device_of = Device::device_of,
      .allocate = Device::allocate,
      .deallocate = Device::deallocate,
      .scratch_bytes = [](const Program& program) { return Scratch(program).bytes; },
      .run =
          [](const Queue& queue, const Workspace& workspace, const Program& program) {
            const FloatingPointMode ieee;  // scalars are rounded here
            // An event would be part of a graph that is being captured, and so of no use outside.
            Device device(queue, program.is_repeatable() && workspace.last_use == nullptr);
            const Outcome outcome = Run<Device>(device, program, workspace).outcome();
            device.finish();
            return outcome;
          },
      .copy =
          [](const Queue& queue, void* to, const void* from, std::size_t bytes) {
            Device device(queue);
            device.copy(to, from, bytes);
            device.finish();
          },
      .synchronize = [](const Queue& queue) { Device(queue).synchronize(); },
  };
}

}  // namespace adamax::cuda

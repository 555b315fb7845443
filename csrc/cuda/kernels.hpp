// The kernels: what one thread of one block does, as functions of its place, for GPU and host.
//
// A kernel is a struct of its arguments with an operator() for one thread and, if threads share
// something, a finish() for after the barrier. `nvcc` wraps it (device.cu); a test runs it thread
// by thread on the host (tests/cpp/emulated_cuda.cpp).
#pragma once

#include <cstdint>
#include <type_traits>

#include "adamax/dtypes.hpp"
#include "core/clip_norm.hpp"
#include "core/update_rule.hpp"
#include "core/vec_scalar.hpp"
#include "cuda/access.hpp"
#include "cuda/tables.hpp"

namespace adamax::cuda {

struct Place {
  std::uint32_t block, thread;
};

template <DType dtype>
using Stored = typename TypeOf<dtype>::Stored;
// What it is computed in.
template <DType dtype>
using Vector = scalar::Vec<typename TypeOf<dtype>::Compute>;

// ---- The step -----------------------------------------------------------------------------------

// What the elementwise kernels have in common. `veto`, where it is set, stands for a gradient that
// is not finite: nothing is changed then. A block is a chunk.
template <class V, bool is_small>
struct Elementwise {
  Table<UpdateRow, is_small> table;
  Groups<V> groups;
  const int* veto;

  ADAMAX_HOST_DEVICE bool is_vetoed() const { return veto != nullptr && *veto != 0; }
  std::uint32_t blocks() const { return table.chunks; }
};

template <int storage, bool has_average, bool has_accumulator, bool is_small>
struct Update : Elementwise<Vector<kStorages[storage].param>, is_small> {
  static constexpr const char* kName = "update";
  using V = Vector<kStorages[storage].param>;
  using T = typename V::Scalar;
  using Param = Stored<kStorages[storage].param>;
  using Grad = Stored<kStorages[storage].grad>;
  using State = Stored<kStorages[storage].state>;

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    if (this->is_vetoed()) return;
    const UpdateRow& row = this->table.row_of(place.block);
    GroupScalars<V> group = this->groups.of(row.group);
    VectorScalars<V>& s = group.scalars;
    if (row.clip != nullptr) {
      s.clip_scale = V(static_cast<T>(*row.clip));
      s.clips = true;
    }
    auto* const param = static_cast<Param*>(row.param);
    auto* const momentum = static_cast<State*>(row.momentum);
    auto* const norm = static_cast<State*>(row.norm);
    auto* const averages = static_cast<State*>(row.average);
    auto* const accumulator = static_cast<State*>(row.accumulator);
    // No gradient: the accumulator's memory is read in its place, and the numbers are dropped,
    // because a load that may not take place would stand between the others.
    const bool has_grad = !has_accumulator || row.grad != nullptr;
    auto* const grad = static_cast<const Grad*>(has_grad ? row.grad : row.accumulator);

    for_each<kWidth<Param, Grad>>(
        stretch_of(row, place.block), place.thread,
        [&](auto access, std::int64_t i) {
          constexpr int kCount = access.width;
          V w[kCount], h[kCount], m[kCount], u[kCount];
          [[maybe_unused]] V average[kCount], accumulated[kCount];
          // All loads before the first store.
          access.load(grad + i, h);
          access.load(param + i, w);
          access.load(momentum + i, m);
          access.load(norm + i, u);
          if constexpr (has_accumulator) access.load(accumulator + i, accumulated);
          if constexpr (has_average) access.load(averages + i, average);
          for (int k = 0; k < kCount; ++k) {
            if (!has_grad) h[k] = V(0);
            if (s.unscales) h[k] = h[k] * s.grad_scale;
            if constexpr (has_accumulator) {
              h[k] = (accumulated[k] + h[k]) * s.mean_scale;
              accumulated[k] = V(0);
            }
            update(w[k], h[k], m[k], u[k], group.decay_rule, group.epsilon_rule, s);
            if constexpr (has_average) {
              w[k] = w[k].rounded_to(param);
              update_average(average[k], w[k], group.average_mode, s);
              if (group.overwrite) w[k] = average[k];
            }
          }
          access.store(m, momentum + i);
          access.store(u, norm + i);
          access.store(w, param + i);
          if constexpr (has_accumulator) access.store(accumulated, accumulator + i);
          if constexpr (has_average) access.store(average, averages + i);
        },
        grad, param, momentum, norm, averages, accumulator);
  }
};

// accumulator += grad * grad_scale
template <DType grad_dtype, bool is_small>
struct Accumulate : Elementwise<Vector<grad_dtype>, is_small> {
  static constexpr const char* kName = "accumulate";
  using V = Vector<grad_dtype>;
  using T = typename V::Scalar;
  using Grad = Stored<grad_dtype>;

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    if (this->is_vetoed()) return;
    const UpdateRow& row = this->table.row_of(place.block);
    const VectorScalars<V> s = this->groups.of(row.group).scalars;
    auto* const grad = static_cast<const Grad*>(row.grad);
    auto* const accumulator = static_cast<T*>(row.accumulator);
    for_each<kWidth<Grad, T>>(
        stretch_of(row, place.block), place.thread,
        [&](auto access, std::int64_t i) {
          V h[access.width], sum[access.width];
          access.load(grad + i, h);
          access.load(accumulator + i, sum);
          for (int k = 0; k < access.width; ++k) sum[k] = sum[k] + h[k] * s.grad_scale;
          access.store(sum, accumulator + i);
        },
        grad, accumulator);
  }
};

// The average alone, for variables without a gradient.
template <DType dtype, bool is_small>
struct Average : Elementwise<Vector<dtype>, is_small> {
  static constexpr const char* kName = "average";
  using V = Vector<dtype>;
  using T = typename V::Scalar;
  using Param = Stored<dtype>;

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    if (this->is_vetoed()) return;
    const UpdateRow& row = this->table.row_of(place.block);
    const GroupScalars<V> group = this->groups.of(row.group);
    auto* const param = static_cast<Param*>(row.param);
    auto* const averages = static_cast<T*>(row.average);
    for_each<kWidth<Param, T>>(
        stretch_of(row, place.block), place.thread,
        [&](auto access, std::int64_t i) {
          V w[access.width], average[access.width];
          access.load(param + i, w);
          access.load(averages + i, average);
          for (int k = 0; k < access.width; ++k) {
            update_average(average[k], w[k], group.average_mode, group.scalars);
          }
          access.store(average, averages + i);
          if (group.overwrite) access.store(average, param + i);
        },
        param, averages);
  }
};

// ---- Norms --------------------------------------------------------------------------------------

// One level of a sum of fixed shape: a sum for each chunk. The first level squares gradients, the
// next ones add the sums of the level before. A thread is a lane of a chunk.
template <DType dtype, bool squares, bool is_small>
struct Sums {
  static constexpr const char* kName = squares ? "squares" : "sums";
  using V = Vector<dtype>;
  using T = typename V::Scalar;
  struct NoGroups {};
  Table<SumsRow, is_small> table;
  std::conditional_t<squares, Groups<V>, NoGroups> groups;
  int* not_finite;  // set to 1 if an element of a source is infinite or NaN; may be null

  static constexpr int kChunks = kThreads / kLanes;  // of a block
  std::uint32_t blocks() const { return (table.chunks + kChunks - 1) / kChunks; }

  // `shared` has room for a number of each thread of the block.
  ADAMAX_HOST_DEVICE void operator()(Place place, double* shared) const {
    const std::uint32_t chunk = chunk_of(place);
    double sum = 0.0;
    if (chunk < table.chunks) {
      const SumsRow& row = table.row_of(chunk);
      const Stretch stretch = stretch_of(row, chunk);
      const std::int64_t first = stretch.begin + place.thread % kLanes;
      const bool by_element = is_aligned(static_cast<const Stored<dtype>*>(row.source)) &&
                              is_aligned(static_cast<const T*>(row.accumulator));
      sum = by_element ? sum_of_lane<ByElement>(row, first, stretch.end)
                       : sum_of_lane<ByByte>(row, first, stretch.end);
    }
    shared[place.thread] = sum;
  }

  ADAMAX_HOST_DEVICE void finish(Place place, double* shared) const {
    const std::uint32_t chunk = chunk_of(place);
    if (place.thread % kLanes != 0 || chunk >= table.chunks) return;
    const SumsRow& row = table.row_of(chunk);
    row.sums[chunk - row.first_chunk] = fold_lanes(shared + place.thread);
  }

 private:
  ADAMAX_HOST_DEVICE static std::uint32_t chunk_of(Place place) {
    return place.block * kChunks + place.thread / kLanes;
  }

  // A lane begins at element `first`.
  template <class One>
  ADAMAX_HOST_DEVICE double sum_of_lane(const SumsRow& row, std::int64_t first,
                                        std::int64_t end) const {
    // No source: the accumulator's memory is read in its place, as above.
    const bool has_source = row.source != nullptr;
    auto* const accumulator = static_cast<const T*>(row.accumulator);
    auto* const source =
        static_cast<const Stored<dtype>*>(has_source ? row.source : row.accumulator);
    if (source == nullptr) return 0.0;  // neither
    [[maybe_unused]] VectorScalars<V> s;
    if constexpr (squares) s = groups.of(row.group).scalars;
    double sum = 0.0;
    bool is_finite = true;
    for_each_column<One, kLanes>(first, end, [&](auto column, std::int64_t i) {
      V h[column.width];
      column.load(source + i, h);
      if constexpr (squares) {
        V accumulated[column.width];
        if (accumulator != nullptr) column.load(accumulator + i, accumulated);
        for (int k = 0; k < column.width; ++k) {
          if (!has_source) h[k] = V(0);
          is_finite = is_finite && h[k].v - h[k].v == T(0);
          if (s.unscales) h[k] = h[k] * s.grad_scale;
          if (accumulator != nullptr) h[k] = (accumulated[k] + h[k]) * s.mean_scale;
          const double wide = static_cast<double>(h[k].v);
          sum = sum + wide * wide;
        }
      } else {
        for (int k = 0; k < column.width; ++k) sum = sum + h[k].v;
      }
    });
    if (not_finite != nullptr && !is_finite) *not_finite = 1;
    return sum;
  }
};

// Coefficients of clipping by norm, from sums of squares: one a variable, or one for all.
struct Clip {
  static constexpr const char* kName = "clip";
  const double* sums_of_squares;
  double* coefficients;
  std::int64_t count;
  double limit;
  bool is_global;

  std::uint32_t blocks() const { return 1; }

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    if (!is_global) {
      for (std::int64_t i = place.thread; i < count; i += kThreads) {
        coefficients[i] = clip_by_norm(limit, sums_of_squares[i]);
      }
    } else if (place.thread == 0) {
      double total = 0.0;
      for_each_column<ByElement, 1>(0, count, [&](auto column, std::int64_t i) {
        scalar::Vec<double> sums[column.width];
        column.load(sums_of_squares + i, sums);
        for (int k = 0; k < column.width; ++k) total = total + sums[k].v;
      });
      coefficients[0] = clip_by_global_norm(limit, total);
    }
  }
};

}  // namespace adamax::cuda

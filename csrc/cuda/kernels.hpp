// The kernels: what one thread of one block does, as functions of its place, for GPU and host.
//
// A kernel is a struct of its arguments with an operator() for one thread and, if threads share
// something, a finish() for after the barrier. `nvcc` wraps it (device.cu); a test runs it thread
// by thread on the host (tests/cpp/emulated_cuda.cpp).
#pragma once

#include <cstdint>

#include "adamax/dtypes.hpp"
#include "core/clip_norm.hpp"
#include "core/step_scalars.hpp"
#include "core/update_rule.hpp"
#include "core/vec_scalar.hpp"
#include "cuda/access.hpp"
#include "cuda/tables.hpp"

namespace adamax::cuda {

struct Place {
  std::uint32_t block, thread;
};

template <DType dtype>
using Storage = typename TypeOf<dtype>::Storage;
template <DType dtype>
using Compute = typename TypeOf<dtype>::Compute;

// ---- The step -----------------------------------------------------------------------------------

// What the elementwise kernels have in common. `veto`, where it is set, stands for a gradient that
// is not finite: nothing is changed then.
template <class T, bool is_small>
struct Elementwise {
  Table<UpdateRow, is_small> table;
  VectorScalars<scalar::Vec<T>> scalars;
  const int* veto;

  ADAMAX_HOST_DEVICE bool is_vetoed() const { return veto != nullptr && *veto != 0; }
  std::uint32_t blocks() const { return table.chunks; }
};

// A block is a chunk.
template <int pair, bool has_average, bool has_accumulator, bool is_small>
struct Update : Elementwise<Compute<kPairs[pair].param>, is_small> {
  static constexpr const char* kName = "update";
  using T = Compute<kPairs[pair].param>;
  using V = scalar::Vec<T>;
  using Param = Storage<kPairs[pair].param>;
  using Grad = Storage<kPairs[pair].grad>;
  EpsilonRule epsilon;
  AverageMode average_mode;
  bool overwrite;

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    if (this->is_vetoed()) return;
    const UpdateRow& row = this->table.row_of(place.block);
    const Rule rule{row.decay, epsilon, has_average, has_accumulator};
    VectorScalars<V> s = this->scalars;
    if (row.clip != nullptr) {
      s.clip_scale = V(static_cast<T>(*row.clip));
      s.clips = true;
    }
    for_each<kWidth<Param, Grad>>(stretch_of(row, place.block), place.thread,
                                  [&](auto width, std::int64_t i) {
                                    update_elements<decltype(width)::value>(row, rule, s, i);
                                  });
  }

 private:
  template <int width>
  ADAMAX_HOST_DEVICE void update_elements(const UpdateRow& row, Rule rule,
                                          const VectorScalars<V>& s, std::int64_t i) const {
    V w[width], h[width], m[width], u[width], average[width], accumulated[width];
    Param* const param = static_cast<Param*>(row.param) + i;
    T* const momentum = static_cast<T*>(row.momentum) + i;
    T* const norm = static_cast<T*>(row.norm) + i;
    T* const averages = static_cast<T*>(row.average) + i;
    T* const accumulator = static_cast<T*>(row.accumulator) + i;
    // All loads before the first store: they wait for memory together.
    load(static_cast<const Grad*>(row.grad) + i, h);
    load(param, w);
    load(momentum, m);
    load(norm, u);
    if constexpr (has_accumulator) load(accumulator, accumulated);
    if constexpr (has_average) load(averages, average);
    for (int k = 0; k < width; ++k) {
      if (s.unscales) h[k] = h[k] * s.grad_scale;
      if constexpr (has_accumulator) {
        h[k] = (accumulated[k] + h[k]) * s.mean_scale;
        accumulated[k] = V(T(0));
      }
      update(w[k], h[k], m[k], u[k], rule, s);
      if constexpr (has_average) {
        w[k] = w[k].rounded_to(param);
        update_average(average[k], w[k], average_mode, s);
        if (overwrite) w[k] = average[k];
      }
    }
    store(m, momentum);
    store(u, norm);
    store(w, param);
    if constexpr (has_accumulator) store(accumulated, accumulator);
    if constexpr (has_average) store(average, averages);
  }
};

// accumulator += grad * grad_scale
template <DType grad_dtype, bool is_small>
struct Accumulate : Elementwise<Compute<grad_dtype>, is_small> {
  static constexpr const char* kName = "accumulate";
  using T = Compute<grad_dtype>;
  using V = scalar::Vec<T>;

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    if (this->is_vetoed()) return;
    const UpdateRow& row = this->table.row_of(place.block);
    for_each<kWidth<Storage<grad_dtype>, Storage<grad_dtype>>>(
        stretch_of(row, place.block), place.thread, [&](auto width, std::int64_t i) {
          V h[decltype(width)::value], sum[decltype(width)::value];
          T* const accumulator = static_cast<T*>(row.accumulator) + i;
          load(static_cast<const Storage<grad_dtype>*>(row.grad) + i, h);
          load(accumulator, sum);
          for (int k = 0; k < width.value; ++k) sum[k] = sum[k] + h[k] * this->scalars.grad_scale;
          store(sum, accumulator);
        });
  }
};

// The average alone, for variables without a gradient.
template <DType dtype, bool is_small>
struct Average : Elementwise<Compute<dtype>, is_small> {
  static constexpr const char* kName = "average";
  using T = Compute<dtype>;
  using V = scalar::Vec<T>;
  AverageMode average_mode;
  bool overwrite;

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    if (this->is_vetoed()) return;
    const UpdateRow& row = this->table.row_of(place.block);
    for_each<kWidth<Storage<dtype>, Storage<dtype>>>(
        stretch_of(row, place.block), place.thread, [&](auto width, std::int64_t i) {
          V w[decltype(width)::value], average[decltype(width)::value];
          Storage<dtype>* const param = static_cast<Storage<dtype>*>(row.param) + i;
          T* const averages = static_cast<T*>(row.average) + i;
          load(param, w);
          load(averages, average);
          for (int k = 0; k < width.value; ++k) {
            update_average(average[k], w[k], average_mode, this->scalars);
          }
          store(average, averages);
          if (overwrite) store(average, param);
        });
  }
};

// ---- Norms --------------------------------------------------------------------------------------

// One level of a sum of fixed shape: a sum for each chunk. The first level squares gradients, the
// next ones add the sums of the level before. A thread is a lane of a chunk.
template <DType dtype, bool squares, bool is_small>
struct Sums {
  static constexpr const char* kName = squares ? "squares" : "sums";
  using T = Compute<dtype>;
  using V = scalar::Vec<T>;
  Table<SumsRow, is_small> table;
  VectorScalars<V> scalars;
  int* not_finite;  // set to 1 if an element is infinite or NaN; may be null

  static constexpr int kGroups = kThreads / kLanes;  // chunks of a block
  std::uint32_t blocks() const { return (table.chunks + kGroups - 1) / kGroups; }

  // `shared` has room for a number of each thread of the block.
  ADAMAX_HOST_DEVICE void operator()(Place place, double* shared) const {
    const std::uint32_t chunk = chunk_of(place);
    double sum = 0.0;
    if (chunk < table.chunks) {
      const SumsRow& row = table.row_of(chunk);
      const Stretch stretch = stretch_of(row, chunk);
      const std::int64_t first = stretch.begin + place.thread % kLanes;
      // The usual chunk has a known length, so that several loads are under way at a time.
      if (stretch.end - stretch.begin == kBlock) {
#pragma unroll 16
        for (int r = 0; r < kBlock / kLanes; ++r) add_element(row, first + r * kLanes, sum);
      } else {
        for (std::int64_t i = first; i < stretch.end; i += kLanes) add_element(row, i, sum);
      }
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
    return place.block * kGroups + place.thread / kLanes;
  }

  ADAMAX_HOST_DEVICE void add_element(const SumsRow& row, std::int64_t i, double& sum) const {
    const T element =
        scalar::to_compute(load_element(static_cast<const Storage<dtype>*>(row.source) + i));
    if constexpr (squares) {
      V h(element);
      if (not_finite != nullptr && !(element - element == T(0))) *not_finite = 1;
      if (scalars.unscales) h = h * scalars.grad_scale;
      if (row.accumulator != nullptr) {
        const V accumulated(load_element(static_cast<const T*>(row.accumulator) + i));
        h = (accumulated + h) * scalars.mean_scale;
      }
      const double wide = static_cast<double>(h.v);
      sum = sum + wide * wide;
    } else {
      sum = sum + element;
    }
  }
};

// Coefficients of clipping by norm, from sums of squares: one a variable, or one for all.
struct Clip {
  static constexpr const char* kName = "clip";
  const double* sums_of_squares;
  double* coefficients;
  int count;
  double limit;
  bool is_global;

  std::uint32_t blocks() const { return 1; }

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    if (!is_global) {
      for (int i = place.thread; i < count; i += kThreads) {
        coefficients[i] = clip_by_norm(limit, sums_of_squares[i]);
      }
    } else if (place.thread == 0) {
      double total = 0.0;
#pragma unroll 16
      for (int i = 0; i < count; ++i) total = total + sums_of_squares[i];
      coefficients[0] = clip_by_global_norm(limit, total);
    }
  }
};

}  // namespace adamax::cuda

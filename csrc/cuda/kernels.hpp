// The kernels: what one thread of one block does, as functions of its place, for GPU and host.
//
// A kernel is a struct of its arguments with an operator() for one of the kThreads threads of a
// block. If those share kShared doubles, it is called for one phase after the other, with a barrier
// between. `nvcc` wraps it (device.cu); a test runs it thread by thread on the host
// (tests/cpp/emulated_cuda.cpp).
#pragma once

#include <cstdint>
#include <type_traits>

#include "adamax/dtypes.hpp"
#include "core/clip_norm.hpp"
#include "core/sum_shape.hpp"
#include "core/update_rule.hpp"
#include "core/vec_scalar.hpp"
#include "cuda/access.hpp"
#include "cuda/tables.hpp"

namespace adamax::cuda {

struct Place {
  std::uint32_t block;
  int thread;
};

template <DType dtype>
using Stored = typename TypeOf<dtype>::Stored;
// What it is computed in.
template <DType dtype>
using Vector = scalar::Vec<typename TypeOf<dtype>::Compute>;

// ---- The step -----------------------------------------------------------------------------------

// What the elementwise kernels have in common. A CUDA block is a chunk, and a thread has one packet
// of each stream: 16 bytes of the widest, so 8 of 16-bit elements beside float32. With 16 bytes of
// both a thread would make two accesses to each float32 stream, 32 bytes from those of its
// neighbours: each access of a warp would touch twice the sectors and use half of them; and twice
// the registers would hold no more bytes under way, as half the threads would find room.
//
// `veto`, where it is set, stands for a gradient that is not finite: nothing is changed then. It is
// looked at behind the loads of the streams, as is a clip, so that they are under way meanwhile.
template <class V, bool is_small>
struct Elementwise {
  static constexpr int kThreads = 128;
  static constexpr int kWidth = 16 / sizeof(V);
  static constexpr int kChunk = kThreads * kWidth;
  Table<UpdateRow, kChunk, is_small> table;
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
    const auto piece = this->table.piece_of(place.block);
    const UpdateRow& row = piece.row;
    auto* const param = static_cast<Param*>(row.param);
    auto* const momentum = static_cast<State*>(row.momentum);
    auto* const norm = static_cast<State*>(row.norm);
    auto* const averages = static_cast<State*>(has_average ? row.average : nullptr);
    auto* const accumulator = static_cast<State*>(has_accumulator ? row.accumulator : nullptr);
    // No gradient: the accumulator's memory is read in its place, and the numbers are dropped,
    // because a load that may not take place would stand between the others.
    const bool has_grad = !has_accumulator || row.grad != nullptr;
    auto* const grad = static_cast<const Grad*>(has_grad ? row.grad : row.accumulator);

    const GroupScalars<V> group = this->groups.of(row.group);
    const auto body = [&](auto access, std::int64_t i) {
      constexpr int kCount = access.width;
      V w[kCount], h[kCount], m[kCount], u[kCount];
      [[maybe_unused]] V average[kCount], accumulated[kCount];
      // All loads before anything waits, and before the first store.
      access.load(grad + i, h);
      access.load(param + i, w);
      access.load(momentum + i, m);
      access.load(norm + i, u);
      if constexpr (has_accumulator) access.load(accumulator + i, accumulated);
      if constexpr (has_average) access.load(averages + i, average);
      VectorScalars<V> s = group.scalars;
      if (row.clip != nullptr) {
        s.clip_scale = V(static_cast<T>(*row.clip));
        s.clips = true;
      }
      if (this->is_vetoed()) return;
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
    };
    for_each<this->kWidth, this->kThreads>(
        piece.stretch, place.thread,
        alignment_of<this->kWidth>(grad, param, momentum, norm, averages, accumulator), body);
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
    const auto piece = this->table.piece_of(place.block);
    const UpdateRow& row = piece.row;
    auto* const grad = static_cast<const Grad*>(row.grad);
    auto* const accumulator = static_cast<T*>(row.accumulator);
    const V grad_scale = this->groups.of(row.group).scalars.grad_scale;
    const auto body = [&](auto access, std::int64_t i) {
      V h[access.width], sum[access.width];
      access.load(grad + i, h);
      access.load(accumulator + i, sum);
      if (this->is_vetoed()) return;
      for (int k = 0; k < access.width; ++k) sum[k] = sum[k] + h[k] * grad_scale;
      access.store(sum, accumulator + i);
    };
    for_each<this->kWidth, this->kThreads>(piece.stretch, place.thread,
                                           alignment_of<this->kWidth>(grad, accumulator), body);
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
    const auto piece = this->table.piece_of(place.block);
    const UpdateRow& row = piece.row;
    auto* const param = static_cast<Param*>(row.param);
    auto* const averages = static_cast<T*>(row.average);
    const GroupScalars<V> group = this->groups.of(row.group);
    const auto body = [&](auto access, std::int64_t i) {
      V w[access.width], average[access.width];
      access.load(param + i, w);
      access.load(averages + i, average);
      if (this->is_vetoed()) return;
      for (int k = 0; k < access.width; ++k) {
        update_average(average[k], w[k], group.average_mode, group.scalars);
      }
      access.store(average, averages + i);
      if (group.overwrite) access.store(average, param + i);
    };
    for_each<this->kWidth, this->kThreads>(piece.stretch, place.thread,
                                           alignment_of<this->kWidth>(param, averages), body);
  }
};

// ---- Norms --------------------------------------------------------------------------------------

// One level of a sum of fixed shape: a sum for each block of the sum. The first level squares
// gradients, the next ones add the sums of the level before.
//
// A chunk is a block of the sum, and a thread is one of its lanes, which adds its numbers in order:
// so what counts is how many are under way to it. A CUDA block has one warp, so that small arrays
// are spread over as many multiprocessors as they can be.
template <DType dtype, bool squares, bool has_accumulator, bool is_small>
struct Sums {
  static constexpr const char* kName = squares ? "squares" : "sums";
  using V = Vector<dtype>;
  using T = typename V::Scalar;
  struct NoGroups {};
  Table<SumsRow, kBlock, is_small> table;
  std::conditional_t<squares, Groups<V>, NoGroups> groups;
  int* not_finite;  // set to 1 if an element of a source is infinite or NaN; may be null

  static constexpr int kThreads = 32;
  static constexpr int kShared = kThreads;  // the sums of the lanes
  // Elements of a lane that are under way together: 32 registers, with more ptxas makes it wait.
  static constexpr int kColumn = 128 / sizeof(V) / (1 + has_accumulator);
  static constexpr int kChunks = kThreads / kLanes;
  std::uint32_t blocks() const { return (table.chunks + kChunks - 1) / kChunks; }
  ADAMAX_HOST_DEVICE int phases() const { return 2; }

  ADAMAX_HOST_DEVICE void operator()(Place place, double* shared, int phase) const {
    const std::uint32_t chunk = place.block * kChunks + place.thread / kLanes;
    const int lane = place.thread % kLanes;
    if (chunk >= table.chunks) return;
    const auto piece = table.piece_of(chunk);
    if (phase == 0) {
      shared[place.thread] = sum_of_lane(piece.row, piece.stretch, lane);
    } else if (lane == 0) {
      piece.row.sums[piece.chunk] = fold_lanes(shared + place.thread);
    }
  }

 private:
  ADAMAX_HOST_DEVICE double sum_of_lane(const SumsRow& row, Stretch stretch, int lane) const {
    // No source: the accumulator's memory is read in its place, as above.
    const bool has_source = !has_accumulator || row.source != nullptr;
    auto* const accumulator = static_cast<const T*>(has_accumulator ? row.accumulator : nullptr);
    auto* const source =
        static_cast<const Stored<dtype>*>(has_source ? row.source : row.accumulator);
    [[maybe_unused]] VectorScalars<V> s;
    if constexpr (squares) s = groups.of(row.group).scalars;
    double sum = 0.0;
    bool is_finite = true;
    const auto body = [&](auto column, std::int64_t i) {
      V h[column.width];
      [[maybe_unused]] V accumulated[column.width];
      column.load(source + i, h);
      if constexpr (has_accumulator) column.load(accumulator + i, accumulated);
      for (int k = 0; k < column.width; ++k) {
        double summand;
        if constexpr (squares) {
          if (!has_source) h[k] = V(0);
          is_finite = is_finite && h[k].v - h[k].v == T(0);
          if (s.unscales) h[k] = h[k] * s.grad_scale;
          if constexpr (has_accumulator) h[k] = (accumulated[k] + h[k]) * s.mean_scale;
          const double wide = static_cast<double>(h[k].v);
          summand = wide * wide;
        } else {
          summand = h[k].v;
        }
        if (column.has(k)) sum = sum + summand;
      }
    };
    alignment_of<1>(source, accumulator) != Alignment::kBytes
        ? for_each_column<ByElement, kLanes, kColumn>(stretch, lane, body)
        : for_each_column<ByByte, kLanes, 4>(stretch, lane, body);
    if (not_finite != nullptr && !is_finite) *not_finite = 1;
    return sum;
  }
};

// Coefficients of clipping by norm, from sums of squares: one a variable, or one for all. The total
// is added by one thread, because its order is the contract, from shared memory, to which all
// threads bring the sums: by itself it would wait for global memory again and again.
struct Clip {
  static constexpr const char* kName = "clip";
  static constexpr int kThreads = 256;
  static constexpr int kTile = 8 * kThreads;
  static constexpr int kShared = kTile + 1;  // sums of squares, and their total so far
  const double* sums_of_squares;
  double* coefficients;
  std::int64_t count;
  double limit;
  bool is_global;

  std::uint32_t blocks() const { return 1; }
  // A tile is brought in one phase and added in the next.
  ADAMAX_HOST_DEVICE int phases() const {
    return is_global ? 2 * static_cast<int>((count + kTile - 1) / kTile) : 1;
  }

  ADAMAX_HOST_DEVICE void operator()(Place place, double* shared, int phase) const {
    if (!is_global) {
      for (std::int64_t i = place.thread; i < count; i += kThreads) {
        coefficients[i] = clip_by_norm(limit, sums_of_squares[i]);
      }
      return;
    }
    const std::int64_t begin = std::int64_t{phase / 2} * kTile;
    const int here = count - begin < kTile ? static_cast<int>(count - begin) : kTile;
    if (phase % 2 == 0) {
      for (int i = place.thread; i < here; i += kThreads) shared[i] = sums_of_squares[begin + i];
    } else if (place.thread == 0) {
      double total = begin == 0 ? 0.0 : shared[kTile];
#ifdef __CUDA_ARCH__
#pragma unroll 32  // for their loads to wait together
#endif
      for (int i = 0; i < here; ++i) total = total + shared[i];
      shared[kTile] = total;
      if (begin + here == count) coefficients[0] = clip_by_global_norm(limit, total);
    }
  }
};

}  // namespace adamax::cuda

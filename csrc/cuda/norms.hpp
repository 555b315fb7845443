// The kernels of norms and of clipping by them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/clip_norm.hpp"
#include "core/sum_shape.hpp"
#include "cuda/kernels.hpp"

namespace adamax::cuda {

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
    if constexpr (squares) s = groups.of(row.group, groups.argument(row.group)).scalars;
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

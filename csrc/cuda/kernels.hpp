// The kernels of a step: what one thread of one block does, as functions of its place, for GPU and
// host.
//
// A kernel is a struct of its arguments with an operator() for one of the kThreads threads of a
// block. If those share kShared doubles, it is called for one phase after the other, with a barrier
// between. If warps look for their largest number (kHasLargest), it has a first_half(), which
// returns that of a thread, and a second_half(), which is told that of its warp; Registers are what
// a thread keeps between. `nvcc` wraps it (device.cu); a test runs it thread by thread on the host
// (tests/cpp/emulated_cuda.cpp).
#pragma once

#include <cstdint>
#include <type_traits>

#include "adamax/dtypes.hpp"
#include "core/bfloat16.hpp"
#include "core/update_rule.hpp"
#include "core/vec_scalar.hpp"
#include "cuda/access.hpp"
#include "cuda/tables.hpp"

namespace adamax::cuda {

struct Place {
  std::uint32_t block;
  int thread;
};
constexpr int kWarp = 32;  // threads that run together, and look for their largest number

template <DType dtype>
using Stored = typename TypeOf<dtype>::Stored;
// What it is computed in.
template <DType dtype>
using Vector = scalar::Vec<typename TypeOf<dtype>::Compute>;

// What the elementwise kernels have in common. A CUDA block is a chunk, and a thread has one packet
// of each stream: 16 bytes of the widest, so 8 of 16-bit elements beside float32. With 16 bytes of
// both a thread would make two accesses to each float32 stream, 32 bytes from those of its
// neighbours: each access of a warp would touch twice the sectors and use half of them; and twice
// the registers would hold no more bytes under way, as half the threads would find room.
//
// `veto`, where it is set, stands for a gradient that is not finite: nothing is changed then. It is
// looked at behind the loads of the streams, as are a clip and the scalars of a group that lie in
// device memory, so that they are under way meanwhile.
template <class V, bool is_small, class TableRow = UpdateRow, int packets = 1>
struct Elementwise {
  static constexpr int kThreads = 128;
  static constexpr int kWidth = 16 / sizeof(V);
  static constexpr int kChunk = kThreads * kWidth * packets;
  Table<TableRow, kChunk, is_small> table;
  Groups<V> groups;
  const int* veto;

  ADAMAX_HOST_DEVICE bool is_vetoed() const { return veto != nullptr && *veto != 0; }
  std::uint32_t blocks() const { return table.chunks; }
};

// Weights with a remainder.
template <class Access, int width>
ADAMAX_HOST_DEVICE void load_joined(const Access& access, const BFloat16* param,
                                    const std::int16_t* remainder, scalar::F32 (&w)[width]) {
  std::uint32_t halves[width], remainders[width];
  access.load(param, halves);
  access.load(remainder, remainders);
  for (int k = 0; k < width; ++k) w[k] = joined<scalar::F32>(halves[k], remainders[k]);
}
template <class Access, int width>
ADAMAX_HOST_DEVICE void store_split(const Access& access, const scalar::F32 (&w)[width],
                                    BFloat16* param, std::int16_t* remainder) {
  std::uint32_t halves[width], remainders[width];
  for (int k = 0; k < width; ++k) {
    halves[k] = half_nearest_away(w[k]);
    remainders[k] = remainder_of(w[k]);
  }
  access.store(halves, param);
  access.store(remainders, remainder);
}

template <int storage, bool has_average, bool has_accumulator, bool is_small>
struct Update : Elementwise<Vector<storage_at(storage).param>, is_small> {
  static constexpr const char* kName = "update";
  using V = Vector<storage_at(storage).param>;
  using T = typename V::Scalar;
  using Param = Stored<storage_at(storage).param>;
  using Grad = Stored<storage_at(storage).grad>;
  using State = T;

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

    const GroupScalars<V> argument = this->groups.argument(row.group);
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
      const GroupScalars<V> group = this->groups.of(row.group, argument);
      if (this->is_vetoed()) return;
      VectorScalars<V> s = group.scalars;
      // Behind the veto: beside the loads of elements ptxas would wait for it, to convert it.
      s.clip_scale = V(row.clip != nullptr ? static_cast<T>(*row.clip) : T(1));
      // All are scaled and clipped, perhaps by 1 and at infinity: exact, and cheaper than to ask.
      s.clips = true;
      for (int k = 0; k < kCount; ++k) h[k] = (has_grad ? h[k] : V(0)) * s.grad_scale;
      // As torch's fused kernels, which store it before they change its sign, rounded to its type,
      // and go on with what it was before the rounding. To change a sign is exact.
      if constexpr (!has_accumulator) {
        if (group.rules.gradient_sign() != 0) {
          V unscaled[kCount];
          for (int k = 0; k < kCount; ++k) unscaled[k] = h[k] * V(group.rules.gradient_sign());
          access.store(unscaled, const_cast<Grad*>(grad) + i);
        }
      }
      for (int k = 0; k < kCount; ++k) {
        if constexpr (has_accumulator) {
          h[k] = (accumulated[k] + h[k]) * s.mean_scale;
          accumulated[k] = V(0);
        }
        update(w[k], h[k], m[k], u[k], group.rules.decay(), group.rules.epsilon(), s);
        if constexpr (has_average) {
          w[k] = w[k].rounded_to(param);
          update_average(average[k], w[k], group.rules.average(), s);
          if (group.rules.overwrites()) w[k] = average[k];
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
    const GroupScalars<V> argument = this->groups.argument(row.group);
    const auto body = [&](auto access, std::int64_t i) {
      V h[access.width], sum[access.width];
      access.load(grad + i, h);
      access.load(accumulator + i, sum);
      const V grad_scale = this->groups.of(row.group, argument).scalars.grad_scale;
      if (this->is_vetoed()) return;
      for (int k = 0; k < access.width; ++k) sum[k] = sum[k] + h[k] * grad_scale;
      access.store(sum, accumulator + i);
    };
    for_each<this->kWidth, this->kThreads>(piece.stretch, place.thread,
                                           alignment_of<this->kWidth>(grad, accumulator), body);
  }
};

// The average alone, for variables without a gradient.
template <DType dtype, bool has_remainder, bool is_small>
struct Average
    : Elementwise<Vector<dtype>, is_small, std::conditional_t<has_remainder, TileRow, UpdateRow>> {
  static constexpr const char* kName = "average";
  using V = Vector<dtype>;
  using T = typename V::Scalar;
  using Param = Stored<dtype>;

  ADAMAX_HOST_DEVICE void operator()(Place place) const {
    const auto piece = this->table.piece_of(place.block);
    const auto& row = piece.row;
    auto* const param = static_cast<Param*>(row.param);
    auto* const averages = static_cast<T*>(row.average);
    std::int16_t* remainder = nullptr;
    if constexpr (has_remainder) remainder = static_cast<std::int16_t*>(row.remainder);
    const GroupScalars<V> argument = this->groups.argument(row.group);
    const auto body = [&](auto access, std::int64_t i) {
      V w[access.width], average[access.width];
      if constexpr (has_remainder) {
        load_joined(access, param + i, remainder + i, w);
      } else {
        access.load(param + i, w);
      }
      access.load(averages + i, average);
      const GroupScalars<V> group = this->groups.of(row.group, argument);
      if (this->is_vetoed()) return;
      for (int k = 0; k < access.width; ++k) {
        update_average(average[k], w[k], group.rules.average(), group.scalars);
      }
      access.store(average, averages + i);
      if (!group.rules.overwrites()) return;
      if constexpr (has_remainder) {
        store_split(access, average, param + i, remainder + i);
      } else {
        access.store(average, param + i);
      }
    };
    for_each<this->kWidth, this->kThreads>(
        piece.stretch, place.thread, alignment_of<this->kWidth>(param, averages, remainder), body);
  }
};

}  // namespace adamax::cuda

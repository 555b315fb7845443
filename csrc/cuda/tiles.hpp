// The kernel of updates that are more than the formula: of state in 16 or 8 bits, and of weights
// that are rounded at random or keep a remainder.
//
// A warp has a tile of kStateBlock elements, which is a block of state in 8 bits, in registers.
// Average, accumulator and rounding are asked for when it runs, so that a pair of dtypes needs one
// kernel for each format of its state.
#pragma once

#include <cstdint>

#include "adamax/dtypes.hpp"
#include "core/bfloat16.hpp"
#include "core/low_state.hpp"
#include "core/random.hpp"
#include "core/update_rule.hpp"
#include "cuda/kernels.hpp"
#include "cuda/lanes.hpp"
#include "cuda/tables.hpp"
#include "cuda/variable_numbers.hpp"

namespace adamax::cuda {

template <int pair, StateFormat state, bool is_small>
struct TileUpdate : Elementwise<scalar::F32, is_small, TileRow, kOfLane / LaneOfPackets::kWidth> {
  static constexpr const char* kName = "update";
  using V = scalar::F32;
  using Bits = V::Bits;
  using Param = Stored<kPairs[pair].param>;
  using Grad = Stored<kPairs[pair].grad>;
  using Momentum = typename StateOf<state>::Momentum;
  using Norm = typename StateOf<state>::Norm;
  // On a multiprocessor at once: registers for no more, as full state takes more of them.
  static constexpr int kBlocks = state == StateFormat::kFull ? 5 : 6;
  static constexpr bool kHasLargest = state == StateFormat::k8Bits;
  static constexpr bool kIsRounded = kPairs[pair].param == DType::kBFloat16;  // in one of many ways

  // What a thread keeps from one half to the other.
  struct Registers {
    std::int64_t row = -1;  // in the table; -1: nothing to do
    std::int64_t begin;     // of the tile
    int count;              // of its elements
    Alignment alignment;
    GroupScalars<V> group;
    VariableNumbers numbers;
    V w[kOfLane], m[kOfLane], u[kOfLane], block_scale[1];
  };

  // Where warps have nothing in common.
  ADAMAX_HOST_DEVICE void operator()(Place place) const
    requires(!kHasLargest)
  {
    Registers r;
    first_half(place, r);
    second_half(place, r, 0.0f);
  }

  // Up to the moments, before they are rounded. Returns the largest norm.
  ADAMAX_HOST_DEVICE float first_half(Place place, Registers& r) const {
    const auto piece = this->table.piece_of(place.block);
    const TileRow& row = piece.row;
    const auto warp = static_cast<std::uint32_t>(place.thread) / kWarp;
    const int tile = static_cast<int>(warp * kStateBlock);  // in the chunk
    const int rest = piece.stretch.count - tile;
    if (rest <= 0) return 0.0f;
    r.begin = piece.stretch.begin + tile;
    r.count = rest < kStateBlock ? rest : static_cast<int>(kStateBlock);
    auto* const param = static_cast<Param*>(row.param);
    auto* const grad = static_cast<const Grad*>(row.grad);
    auto* const momentum = static_cast<Momentum*>(row.momentum);
    auto* const norm = static_cast<Norm*>(row.norm);
    auto* const average = static_cast<float*>(row.average);
    auto* const accumulator = static_cast<float*>(row.accumulator);
    auto* const remainder = static_cast<std::int16_t*>(row.remainder);
    r.alignment = alignment_of<1>(row.norm_scale) == Alignment::kBytes
                      ? Alignment::kBytes
                      : alignment_of<LaneOfPackets::kWidth>(grad, param, momentum, norm, average,
                                                            accumulator, remainder);

    const GroupScalars<V> argument = this->groups.argument(row.group);
    Packed<Param> weights;
    Packed<Grad> gradients;
    Packed<Momentum> momenta;
    Packed<Norm> norms;
    Packed<float> accumulated;
    Packed<std::int16_t> remainders;
    bool is_vetoed;
    with_lane(r.begin, place.thread, r.count, r.alignment, [&](auto lane) {
      // All loads before anything waits, and before the first store. The gradient of elements that
      // are missing is NaN, which the scale of a block does not count.
      constexpr std::uint32_t kNan = ~0u;
      lane.load(param, weights);
      if (grad != nullptr) lane.load(grad, gradients, kNan);
      lane.load(momentum, momenta);
      lane.load(norm, norms);
      if constexpr (kIsRounded) {
        if (remainder != nullptr) lane.load(remainder, remainders);
      }
      if (accumulator != nullptr) lane.load(accumulator, accumulated, kNan);
      if constexpr (state == StateFormat::k8Bits) {
        decltype(lane)::One::load(row.norm_scale + block_of(r.begin), r.block_scale);
      }
      r.numbers = row.numbers[slab_of(row.first_element + r.begin) - slab_of(row.first_element)];
      r.group = this->groups.of(row.group, argument);
      is_vetoed = this->is_vetoed();
    });
    if (is_vetoed) return 0.0f;
    r.row = &row - this->table.rows;
    VectorScalars<V>& s = r.group.scalars;

    for (int k = 0; k < kOfLane; ++k) r.w[k] = V(scalar::to_compute(weights[k]));
    if constexpr (kIsRounded) {
      if (remainder != nullptr) {
        for (int k = 0; k < kOfLane; ++k) {
          r.w[k] = joined<V>(weights[k].bits, static_cast<Bits>(remainders[k]));
        }
      }
    }
    V h[kOfLane];
    if (grad != nullptr) {
      for (int k = 0; k < kOfLane; ++k) h[k] = V(scalar::to_compute(gradients[k])) * s.grad_scale;
    } else {
      for (V& x : h) x = V(0.0f);
    }
    if (r.group.rules.gradient_sign() != 0) {  // as in Update
      for (int k = 0; k < kOfLane; ++k) gradients.set(k, h[k] * V(r.group.rules.gradient_sign()));
      with_lane(r.begin, place.thread, r.count, r.alignment,
                [&](auto lane) { lane.store(gradients, const_cast<Grad*>(grad)); });
    }
    if (accumulator != nullptr) {
      for (int k = 0; k < kOfLane; ++k) h[k] = (V(accumulated[k]) + h[k]) * s.mean_scale;
      with_lane(r.begin, place.thread, r.count, r.alignment,
                [&](auto lane) { lane.store(Packed<float>{}, accumulator); });
    }

    if (row.clip != nullptr || s.clips) {
      const V scale(row.clip != nullptr ? static_cast<float>(*row.clip) : 1.0f);
      for (V& x : h) x = clamp(x * scale, s.clip_value);
    }
    s.clips = false;  // no more: to ask for each element again would take registers

    const DecayRule decay = r.group.rules.decay();
    const EpsilonRule epsilon = r.group.rules.epsilon();
    if constexpr (state != StateFormat::k8Bits) {
      for (int k = 0; k < kOfLane; ++k) {
        r.m[k] = V(scalar::to_compute(momenta[k]));
        r.u[k] = V(scalar::to_compute(norms[k]));
        if constexpr (state == StateFormat::k16Bits) r.u[k] = r.u[k] * V(r.numbers.scale);
        update(r.w[k], h[k], r.m[k], r.u[k], decay, epsilon, s);
      }
      return 0.0f;
    } else {
      for (int k = 0; k < kOfLane; ++k) {
        if (decay == DecayRule::kL2) h[k] = limited(h[k], r.w[k], decay, s);
        move_moments(r.m[k], r.u[k], static_cast<Bits>(momenta[k]), Bits{norms[k]},
                     r.block_scale[0], h[k], epsilon, s);
      }
      V largest(0.0f);
      for (const V u : r.u) largest = larger_number(u, largest);
      if (!(largest.v < kPoison)) {
        largest = V(0.0f);
        for (const V u : r.u) largest = u.v < kPoison ? larger_number(u, largest) : largest;
      }
      return largest.v;
    }
  }

  // Rounds, and stores. `largest` is that of the warp.
  ADAMAX_HOST_DEVICE void second_half(Place place, Registers& r, float largest) const {
    if (r.row < 0) return;
    const TileRow& row = this->table.rows[r.row];
    const VectorScalars<V>& s = r.group.scalars;
    const auto first = static_cast<std::uint64_t>(row.first_element + r.begin);
    const bool is_at_random = kIsRounded && row.rounding == WeightRounding::kStochastic;
    [[maybe_unused]] Bits for_momentum[kOfLane / 4]{}, for_weights[kOfLane / 2]{};
    Packed<float> averages;
    with_lane(r.begin, place.thread, r.count, r.alignment, [&](auto lane) {
      // Not earlier: it would take registers from others, and much is to be done before it is used.
      if (row.average != nullptr) lane.load(static_cast<float*>(row.average), averages);
      if constexpr (state != StateFormat::kFull) {
        lane.template draw<4>(static_cast<Bits>(first / 4), r.numbers.of_momentum, for_momentum);
      }
      if constexpr (kIsRounded) {
        if (is_at_random) {
          lane.template draw<2>(static_cast<Bits>(first / 2), r.numbers.of_weights, for_weights);
        }
      }
    });
    const auto byte_of = [&](int k) { return for_momentum[k / 4] >> k % 4 * 8 & 0xffu; };

    Packed<Momentum> momenta;
    Packed<Norm> norms;
    if constexpr (state == StateFormat::kFull) {
      for (int k = 0; k < kOfLane; ++k) {
        momenta.set(k, r.m[k]);
        norms.set(k, r.u[k]);
      }
    } else if constexpr (state == StateFormat::k16Bits) {
      for (int k = 0; k < kOfLane; ++k) {
        momenta.set(k, momentum_half(r.m[k], byte_of(k)));
        norms.set(k, norm_half(r.u[k], V(r.numbers.inverse)));
      }
    } else {
      r.block_scale[0] = V(next_block_scale(r.block_scale[0].v, largest, s.beta_2.v));
      const V inverse(inverse_scale(r.block_scale[0].v));
      const DecayRule decay = r.group.rules.decay();
      for (int k = 0; k < kOfLane; ++k) {
        const Bits rounded = rounded_norm(r.u[k], inverse);
        const Bits code = norm_code<V>(rounded);
        norms.set(k, code < 255 ? code : 255);
        const V u = stored_norm(rounded, r.block_scale[0]);
        const V ratio = r.m[k] / divisor(u, r.group.rules.epsilon(), s);
        momenta.set(k, ratio_code(ratio, byte_of(k)) & 0xffu);
        r.w[k] = decayed(r.w[k], decay, s) - s.rate * ratio;
      }
    }

    Packed<Param> weights;
    Packed<std::int16_t> remainders;
    if constexpr (kIsRounded) {
      if (is_at_random) {
        for (int k = 0; k < kOfLane; ++k) {
          weights.set(k, half_at_random(r.w[k], for_weights[k / 2] >> k % 2 * 16 & 0xffffu));
          r.w[k] = V(scalar::to_compute(weights[k]));
        }
      }
    }
    bool is_rounded = is_at_random;
    if (row.average != nullptr) {
      // Of the weight as it is stored, with its remainder. What it overwrites is rounded to
      // nearest.
      for (int k = 0; k < kOfLane; ++k) {
        if (row.rounding == WeightRounding::kNearest) {
          r.w[k] = r.w[k].rounded_to(static_cast<Param*>(row.param));
        }
        V average(averages[k]);
        update_average(average, r.w[k], r.group.rules.average(), s);
        averages.set(k, average);
        if (r.group.rules.overwrites()) r.w[k] = average;
      }
      if (r.group.rules.overwrites()) is_rounded = false;
    }
    if (!is_rounded) {
      for (int k = 0; k < kOfLane; ++k) weights.set(k, r.w[k]);
    }
    if constexpr (kIsRounded) {
      if (row.remainder != nullptr) {
        for (int k = 0; k < kOfLane; ++k) {
          weights.set(k, half_nearest_away(r.w[k]));
          remainders.set(k, remainder_of(r.w[k]));
        }
      }
    }

    with_lane(r.begin, place.thread, r.count, r.alignment, [&](auto lane) {
      lane.store(momenta, static_cast<Momentum*>(row.momentum));
      lane.store(norms, static_cast<Norm*>(row.norm));
      lane.store(weights, static_cast<Param*>(row.param));
      if constexpr (kIsRounded) {
        auto* const remainder = static_cast<std::int16_t*>(row.remainder);
        if (remainder != nullptr) lane.store(remainders, remainder);
      }
      if (row.average != nullptr) {
        lane.store(averages, static_cast<float*>(row.average));
      }
      if (state == StateFormat::k8Bits && place.thread % kWarp == 0) {
        decltype(lane)::One::store(r.block_scale, row.norm_scale + block_of(r.begin));
      }
    });
  }

 private:
  ADAMAX_HOST_DEVICE static std::uint64_t block_of(std::int64_t begin) {
    return static_cast<std::uint64_t>(begin) / kStateBlock;
  }
};

}  // namespace adamax::cuda

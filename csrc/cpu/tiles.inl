// The loops over tiles of kStateBlock elements: for state in 16 or 8 bits, and for weights that are
// rounded at random or keep a remainder.
//
// Included behind kernels.inl's loop over vectors. A step of a tile is update_elements(), or
// update_block() for 8 bits; gradients that need work get a pass of their own before, averages one
// behind.
//
// Each pass goes over the tile in groups of four vectors, which share stores of 8 and 16 bits. What
// waits for what should be short in each: a processor looks a few hundred instructions ahead, and
// should find other vectors there.

#include "cpu/tile_memory.inl"

// ---- Averages -----------------------------------------------------------------------------------

// Of the weights as they are stored, with their remainder. What an average overwrites is rounded to
// nearest.
template <Storage storage>
void average_tile(const Tile<storage>& tile, const Scalars& scalars, const VectorScalars<F32>& s) {
  for (int i = 0; i < kStateBlock; i += 4 * F32::kLanes) {
    prefetch_four(tile.average + i);
    F32 averages[4];
    for (int k = 0; k < 4; ++k) {
      const int e = i + k * F32::kLanes;
      averages[k] = F32::load(tile.average + e);
      update_average(averages[k], load_weight(tile, e), scalars.average_mode, s);
      averages[k].store(tile.average + e);
    }
    if (scalars.overwrite) store_weights(averages, tile, i, nullptr);
  }
}

// The average alone, of weights with a remainder.
inline void average_in_tiles(const Arrays& memory, const Scalars& scalars, const Slice& slice) {
  constexpr Storage kStorage{DType::kBFloat16, DType::kBFloat16, StateFormat::kFull,
                             WeightRounding::kRemainder};
  const VectorScalars<F32> s(scalars, 1.0);
  // Nothing else: state may lie in another format.
  const Arrays averaged{
      .param = memory.param, .average = memory.average, .remainder = memory.remainder};
  for_each_tile<kStorage>(averaged, slice, [&](const Tile<kStorage>& tile, std::int64_t) {
    average_tile(tile, scalars, s);
  });
}

// ---- One step of a tile -------------------------------------------------------------------------

// What the tiles of a variable have in common.
template <Storage storage>
struct TileStep {
  VectorScalars<F32> s;
  const Scalars& scalars;
  RandomWords<kStateBlock / 2> of_weights;
  RandomWords<kStateBlock / 4> of_momentum;

  TileStep(const Scalars& scalars, const Slice& slice)
      : s(scalars, slice.clip),
        scalars(scalars),
        of_weights({scalars.seed, scalars.step, slice.variable}, RandomStream::kWeights),
        of_momentum({scalars.seed, scalars.step, slice.variable}, RandomStream::kMomentum) {}

  // Whether the gradients of a tile are what moves the moments.
  bool takes_gradients_as_they_are(const Tile<storage>& tile) const {
    return tile.grad != nullptr && tile.accumulator == nullptr && !s.unscales && !s.clips &&
           scalars.decay_rule != DecayRule::kL2;
  }
  // What moves the moments, if they are not.
  void prepare_gradients(const Tile<storage>& tile, float* prepared) const {
    for (int i = 0; i < kStateBlock; i += F32::kLanes) {
      F32 h(0.0f);
      if (tile.grad != nullptr) {
        h = F32::load(tile.grad + i);
        if (s.unscales) h = h * s.grad_scale;
      }
      if (tile.accumulator != nullptr) {
        prefetch<F32>(tile.accumulator + i, kAheadInMemory);
        h = (F32::load(tile.accumulator + i) + h) * s.mean_scale;
        F32(0.0f).store(tile.accumulator + i);
      }
      limited(h, load_weight(tile, i), scalars.decay_rule, s).store(prepared + i);
    }
  }
};

// State in full or in 16 bits: an element has nothing to do with others. `scale` is that of the
// variable's norms.
template <DecayRule decay, EpsilonRule epsilon, Storage storage, class Grad>
[[gnu::noinline]] void update_elements(Tile<storage> tile, const Grad* grad,
                                       const TileStep<storage>& step, float scale) {
  using V = F32;
  constexpr bool kSmall = storage.state == StateFormat::k16Bits;
  const VectorScalars<V> s = step.s;
  const V old_scale(scale);
  const V inverse(1.0f / next_variable_scale(scale, static_cast<float>(step.scalars.beta_2)));
  const auto* const drawn = step.of_momentum.template as<std::uint8_t>();
  for (int i = 0; i < kStateBlock; i += 4 * V::kLanes) {
    prefetch_weights(tile, i);
    prefetch_four(grad + i);
    prefetch_four(tile.momentum + i);
    prefetch_four(tile.norm + i);
    V w[4], m[4], u[4];
    for (int k = 0; k < 4; ++k) {
      const int e = i + k * V::kLanes;
      w[k] = decayed(load_weight(tile, e), decay, s);
      m[k] = V::load(tile.momentum + e);
      u[k] = V::load(tile.norm + e);
      if constexpr (kSmall) u[k] = u[k] * old_scale;
      update_limited(w[k], V::load(grad + e), m[k], u[k], epsilon, s);
    }
    if constexpr (kSmall) {
      V::Bits halves[4];
      for (int k = 0; k < 4; ++k) {
        halves[k] = momentum_half(m[k], V::load_bits(drawn + i + k * V::kLanes));
      }
      V::store_halves(halves, words(tile.momentum + i));
      for (int k = 0; k < 4; ++k) halves[k] = norm_half(u[k], inverse);
      V::store_halves(halves, words(tile.norm + i));
    } else {
      for (int k = 0; k < 4; ++k) {
        m[k].store(tile.momentum + i + k * V::kLanes);
        u[k].store(tile.norm + i + k * V::kLanes);
      }
    }
    store_weights(w, tile, i, step.of_weights.template as<std::uint16_t>());
  }
}

inline float largest_lane(F32 vector) {
  float lanes[F32::kLanes], largest = 0.0f;
  vector.store(lanes);
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// State in 8 bits: a norm is rounded to its code, for which its block is looked at, before it
// divides. What is stored is what steps.
template <DecayRule decay, EpsilonRule epsilon, Storage storage, class Grad>
[[gnu::noinline]] void update_block(Tile<storage> tile, const Grad* grad,
                                    const TileStep<storage>& step, float* block_scale) {
  using V = F32;
  const VectorScalars<V> s = step.s;
  const float beta_2 = static_cast<float>(step.scalars.beta_2);

  // The moments as they move.
  alignas(64) float momentum[kStateBlock], norm[kStateBlock];
  const float scale = scalar::F32::load(block_scale).v;
  const V old_scale(scale);
  V largest(0.0f);
  for (int i = 0; i < kStateBlock; i += 4 * V::kLanes) {
    prefetch_four(grad + i);
    prefetch_four(tile.momentum + i);
    prefetch_four(tile.norm + i);
    for (int k = 0; k < 4; ++k) {
      const int e = i + k * V::kLanes;
      V m, u;
      move_moments(m, u, V::load_bits(tile.momentum + e), V::load_bits(tile.norm + e), old_scale,
                   V::load(grad + e), epsilon, s);
      m.store(momentum + e);
      u.store(norm + e);
      largest = larger_number(u, largest);
    }
  }

  // The scale of the block.
  float most = largest_lane(largest);
  if (!(most < kPoison)) {
    most = 0.0f;
    for (const float u : norm) most = u < kPoison && u > most ? u : most;
  }
  const float next_scale = next_block_scale(scale, most, beta_2);
  scalar::F32(next_scale).store(block_scale);

  // The norms as codes, and the ratios, which take the place of the first moments.
  const V new_scale(next_scale), inverse(inverse_scale(next_scale));
  for (int i = 0; i < kStateBlock; i += 4 * V::kLanes) {
    V::Bits codes[4];
    for (int k = 0; k < 4; ++k) {
      const int e = i + k * V::kLanes;
      const V::Bits rounded = rounded_norm(V::load(norm + e), inverse);
      codes[k] = norm_code<V>(rounded);
      const V u = stored_norm(rounded, new_scale);
      (V::load(momentum + e) / divisor(u, epsilon, s)).store(momentum + e);
    }
    V::store_bytes(codes, tile.norm + i);
  }

  // The ratios as codes, and the weights.
  const auto* const drawn = step.of_momentum.template as<std::uint8_t>();
  for (int i = 0; i < kStateBlock; i += 4 * V::kLanes) {
    prefetch_weights(tile, i);
    V w[4];
    V::Bits codes[4];
    for (int k = 0; k < 4; ++k) {
      const int e = i + k * V::kLanes;
      const V ratio = V::load(momentum + e);
      codes[k] = ratio_code(ratio, V::load_bits(drawn + e));
      w[k] = decayed(load_weight(tile, e), decay, s) - s.rate * ratio;
    }
    V::store_bytes(codes, tile.momentum + i);
    store_weights(w, tile, i, step.of_weights.template as<std::uint16_t>());
  }
}

template <DecayRule decay, EpsilonRule epsilon, Storage storage, class Grad>
void update_tile(Tile<storage> tile, const Grad* grad, const TileStep<storage>& step,
                 float* scale) {
  if constexpr (storage.state == StateFormat::k8Bits) {
    update_block<decay, epsilon>(tile, grad, step, scale);
  } else {
    update_elements<decay, epsilon>(tile, grad, step,
                                    scale == nullptr ? 1.0f : scalar::F32::load(scale).v);
  }
}

template <Storage storage>
void update_in_tiles(const Arrays& memory, const Scalars& scalars, const Slice& slice) {
  TileStep<storage> step(scalars, slice);
  const bool is_inside = scalars.epsilon_rule == EpsilonRule::kInside;
  const auto update_by_rule = [&](const Tile<storage>& tile, const auto* grad, float* scale) {
    constexpr auto kNone = DecayRule::kNone, kDecoupled = DecayRule::kDecoupled;
    constexpr auto kInside = EpsilonRule::kInside, kOutside = EpsilonRule::kOutside;
    if (scalars.decay_rule == kDecoupled) {
      is_inside ? update_tile<kDecoupled, kInside>(tile, grad, step, scale)
                : update_tile<kDecoupled, kOutside>(tile, grad, step, scale);
    } else {  // the L2 decay is in the prepared gradient
      is_inside ? update_tile<kNone, kInside>(tile, grad, step, scale)
                : update_tile<kNone, kOutside>(tile, grad, step, scale);
    }
  };
  for_each_tile<storage>(memory, slice, [&](const Tile<storage>& tile, std::int64_t begin) {
    const std::int64_t first = slice.first_element + begin;
    if constexpr (storage.rounding == WeightRounding::kStochastic) step.of_weights.draw(first / 2);
    if constexpr (storage.state != StateFormat::kFull) step.of_momentum.draw(first / 4);
    const bool has_blocks = storage.state == StateFormat::k8Bits;
    float* const scale = memory.norm_scale + (has_blocks ? begin / kStateBlock : 0);
    if (step.takes_gradients_as_they_are(tile)) {
      update_by_rule(tile, tile.grad, scale);
    } else {
      alignas(64) float prepared[kStateBlock];
      step.prepare_gradients(tile, prepared);
      update_by_rule(tile, static_cast<const float*>(prepared), scale);
    }
    if (tile.average != nullptr) average_tile(tile, scalars, step.s);
  });
}

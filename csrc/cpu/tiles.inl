// The loop over tiles of kStateBlock elements: for state in 16 or 8 bits, and for weights that are
// rounded at random or keep a remainder.
//
// Included behind kernels.inl's loop over vectors. A tile is always whole: the last one of a
// variable is worked on in a copy. What a rule does is asked for several vectors together, so that
// a storage needs one loop, and not one for each rule.

// The words of one stream of random numbers, for a tile at a time.
template <int count>
class RandomWords {
 public:
  RandomWords(const RandomSource& source, RandomStream stream) : source_(source), stream_(stream) {}

  // From a multiple of `count` on.
  [[gnu::always_inline]] void draw(std::int64_t first) {
    if (const std::int64_t slab = first >> 32; slab != slab_) {
      slab_ = slab;
      keys_ = random_keys(source_, stream_, static_cast<std::uint32_t>(slab));
    }
    const F32::Bits begin = F32::counted() + static_cast<std::uint32_t>(first);
    for (int k = 0; k < count; k += F32::kLanes) {
      F32::store_bits(random_words(begin + static_cast<std::uint32_t>(k), keys_), words_ + k);
    }
  }
  // As the numbers that they are made of, in the order of the elements.
  template <class Number>
  const Number* as() const {
    return reinterpret_cast<const Number*>(words_);
  }

 private:
  RandomSource source_;
  RandomStream stream_;
  std::int64_t slab_ = -1;  // whose keys are known
  RandomKeys keys_{};
  alignas(64) std::uint32_t words_[count];
};

template <StateFormat>
struct StateOf {
  using Momentum = float;
  using Norm = float;
};
template <>
struct StateOf<StateFormat::k16Bits> {
  using Momentum = BFloat16;
  using Norm = BFloat16;
};
template <>
struct StateOf<StateFormat::k8Bits> {
  using Momentum = std::int8_t;
  using Norm = std::uint8_t;
};

// Where the arrays of a tile begin.
template <Storage storage>
struct Tile {
  using Param = typename TypeOf<storage.param>::Stored;
  using Grad = typename TypeOf<storage.grad>::Stored;
  using Momentum = typename StateOf<storage.state>::Momentum;
  using Norm = typename StateOf<storage.state>::Norm;
  Param* param;
  const Grad* grad;  // null beside an accumulator: zero
  Momentum* momentum;
  Norm* norm;
  float* average;
  float* accumulator;
  std::int16_t* remainder;

  Tile(const Arrays& memory, std::int64_t begin)
      : param(at<Param>(memory.param, begin)),
        grad(at<const Grad>(memory.grad, begin)),
        momentum(at<Momentum>(memory.momentum, begin)),
        norm(at<Norm>(memory.norm, begin)),
        average(at<float>(memory.average, begin)),
        accumulator(at<float>(memory.accumulator, begin)),
        remainder(at<std::int16_t>(memory.remainder, begin)) {}

  [[gnu::always_inline]] void prefetch_ahead(std::int64_t bytes) const {
    prefetch_tile(param, bytes);
    prefetch_tile(grad, bytes);
    prefetch_tile(momentum, bytes);
    prefetch_tile(norm, bytes);
    prefetch_tile(average, bytes);
    prefetch_tile(accumulator, bytes);
    prefetch_tile(remainder, bytes);
  }

 private:
  template <class T, class Void>
  static T* at(Void* array, std::int64_t begin) {
    return array == nullptr ? nullptr : static_cast<T*>(array) + begin;
  }
  template <class T>
  [[gnu::always_inline]] static void prefetch_tile(const T* p, std::int64_t bytes) {
    constexpr int kCacheLine = 64;
    if (p == nullptr) return;
    for (int i = 0; i < kStateBlock; i += kCacheLine / sizeof(T)) prefetch<F32>(p + i, bytes);
  }
};

// Calls body(tile) with copies of the `count` elements that a tile has. The gradient of the others
// is NaN, which the scale of a block does not count.
template <Storage storage, class Body>
void with_copies(const Arrays& memory, std::int64_t begin, std::int64_t count, const Body& body) {
  const Tile<storage> tile(memory, begin);
  struct Array {
    void* original;
    std::size_t itemsize;
    alignas(64) unsigned char copy[kStateBlock * sizeof(float)];
  } arrays[] = {
      {tile.param, sizeof(*tile.param), {}},
      {const_cast<typename Tile<storage>::Grad*>(tile.grad), sizeof(*tile.grad), {}},
      {tile.momentum, sizeof(*tile.momentum), {}},
      {tile.norm, sizeof(*tile.norm), {}},
      {tile.average, sizeof(*tile.average), {}},
      {tile.accumulator, sizeof(*tile.accumulator), {}},
      {tile.remainder, sizeof(*tile.remainder), {}},
  };
  constexpr int kGrad = 1, kAccumulator = 5;
  for (const int gradient : {kGrad, kAccumulator}) {
    __builtin_memset(arrays[gradient].copy, 0xff, sizeof(Array::copy));
  }
  const auto copy_or_null = [&](int i) -> void* {
    if (arrays[i].original == nullptr) return nullptr;
    return __builtin_memcpy(arrays[i].copy, arrays[i].original, count * arrays[i].itemsize);
  };
  const Arrays copies{.param = copy_or_null(0),
                      .grad = copy_or_null(kGrad),
                      .momentum = copy_or_null(2),
                      .norm = copy_or_null(3),
                      .average = copy_or_null(4),
                      .accumulator = copy_or_null(kAccumulator),
                      .remainder = copy_or_null(6)};
  body(Tile<storage>(copies, 0));
  for (Array& array : arrays) {
    if (array.original == nullptr || &array == &arrays[kGrad]) continue;
    __builtin_memcpy(array.original, array.copy, count * array.itemsize);
  }
}

template <Storage storage>
[[gnu::always_inline]] inline F32 load_weight(const Tile<storage>& tile, int i) {
  if constexpr (storage.rounding == WeightRounding::kRemainder) {
    return joined<F32>(F32::load_bits(&tile.param[i].bits), F32::load_bits(tile.remainder + i));
  } else {
    return F32::load(tile.param + i);
  }
}
template <Storage storage>
[[gnu::always_inline]] inline void store_with_remainder(F32 w, const Tile<storage>& tile, int i) {
  F32::store_bits(half_nearest_away(w), &tile.param[i].bits);
  F32::store_bits(remainder_of(w), reinterpret_cast<std::uint16_t*>(tile.remainder + i));
}

// Calls body(tile, begin) for the tiles of a slice.
template <Storage storage, class Body>
[[gnu::always_inline]] inline void for_each_tile(const Arrays& memory, const Slice& slice,
                                                 const Body& body) {
  for (std::int64_t begin = slice.begin; begin < slice.end; begin += kStateBlock) {
    if (begin + kStateBlock <= slice.end) {
      const Tile<storage> tile(memory, begin);
      tile.prefetch_ahead(slice.ahead);
      body(tile, begin);
    } else {
      with_copies<storage>(memory, begin, slice.end - begin,
                           [&](const Tile<storage>& tile) { body(tile, begin); });
    }
  }
}

inline float largest_lane(F32 vector) {
  float lanes[F32::kLanes], largest = 0.0f;
  vector.store(lanes);
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

template <Storage storage>
void update_in_tiles(const Arrays& memory, const Scalars& scalars, const Slice& slice) {
  using V = F32;
  using Bits = V::Bits;
  constexpr StateFormat state = storage.state;
  constexpr WeightRounding rounding = storage.rounding;
  constexpr int kFour = 4 * V::kLanes;
  const VectorScalars<V> s(scalars, slice.clip);
  const DecayRule decay = scalars.decay_rule;
  const EpsilonRule epsilon = scalars.epsilon_rule;
  const float beta_2 = static_cast<float>(scalars.beta_2);
  const RandomSource source{scalars.seed, scalars.step, slice.variable};
  RandomWords<kStateBlock / 2> of_weights(source, RandomStream::kWeights);
  RandomWords<kStateBlock / 4> of_momentum(source, RandomStream::kMomentum);
  const auto drawn_for_momentum = [&](int i) __attribute__((always_inline)) {
    return V::load_bits(of_momentum.template as<std::uint8_t>() + i);
  };

  const auto load_gradients = [&](const Tile<storage>& tile, int i,
                                  V(&h)[4]) __attribute__((always_inline)) {
    if (tile.grad != nullptr) {
      for (int k = 0; k < 4; ++k) h[k] = V::load(tile.grad + i + k * V::kLanes);
      if (s.unscales) {
        for (int k = 0; k < 4; ++k) h[k] = h[k] * s.grad_scale;
      }
    } else {
      for (int k = 0; k < 4; ++k) h[k] = V(0.0f);
    }
    if (tile.accumulator != nullptr) {
      for (int k = 0; k < 4; ++k) {
        float* const accumulator = tile.accumulator + i + k * V::kLanes;
        h[k] = (V::load(accumulator) + h[k]) * s.mean_scale;
        V(0.0f).store(accumulator);
      }
    }
  };
  const auto store_weights = [&](V(&w)[4], const Tile<storage>& tile,
                                 int i) __attribute__((always_inline)) {
    [[maybe_unused]] Bits halves[4];
    if constexpr (rounding == WeightRounding::kStochastic) {
      for (int k = 0; k < 4; ++k) {
        const auto* const drawn = of_weights.template as<std::uint16_t>();
        halves[k] = half_at_random(w[k], V::load_bits(drawn + i + k * V::kLanes));
      }
    }
    if (tile.average != nullptr) {
      // Of the weight as it is stored, with its remainder. What it overwrites is rounded to
      // nearest.
      for (int k = 0; k < 4; ++k) {
        if constexpr (rounding == WeightRounding::kNearest) w[k] = w[k].rounded_to(tile.param);
        if constexpr (rounding == WeightRounding::kStochastic) w[k] = V::from_bits(halves[k] << 16);
        float* const averages = tile.average + i + k * V::kLanes;
        V average = V::load(averages);
        update_average(average, w[k], scalars.average_mode, s);
        average.store(averages);
        if (scalars.overwrite) {
          w[k] = average;
          if constexpr (rounding == WeightRounding::kStochastic) {
            halves[k] = average.rounded_to(tile.param).bits() >> 16;
          }
        }
      }
    }
    for (int k = 0; k < 4; ++k) {
      auto* const param = tile.param + i + k * V::kLanes;
      if constexpr (rounding == WeightRounding::kNearest) w[k].store(param);
      if constexpr (rounding == WeightRounding::kStochastic) V::store_bits(halves[k], &param->bits);
      if constexpr (rounding == WeightRounding::kRemainder) {
        store_with_remainder(w[k], tile, i + k * V::kLanes);
      }
    }
  };

  // State that is read, and stored, without a look at other elements.
  const float scale = state == StateFormat::k16Bits ? *memory.norm_scale : 1.0f;
  const V old_scale(scale), inverse(1.0f / next_variable_scale(scale, beta_2));
  const auto update_elements = [&](const auto& tile) __attribute__((always_inline)) {
    for (int i = 0; i < kStateBlock; i += kFour) {
      V h[4], w[4];
      load_gradients(tile, i, h);
      for (int k = 0; k < 4; ++k) {
        const int e = i + k * V::kLanes;
        w[k] = load_weight(tile, e);
        V m = V::load(tile.momentum + e), u = V::load(tile.norm + e);
        if constexpr (state == StateFormat::k16Bits) u = u * old_scale;
        update(w[k], h[k], m, u, decay, epsilon, s);
        if constexpr (state == StateFormat::k16Bits) {
          const Bits drawn = (drawn_for_momentum(e) << 8) + 128u;
          V::store_bits(half_at_random(m, drawn), &tile.momentum[e].bits);
          V::store_bits(half_nearest_away(u * inverse), &tile.norm[e].bits);
        } else {
          m.store(tile.momentum + e);
          u.store(tile.norm + e);
        }
      }
      store_weights(w, tile, i);
    }
  };

  // State in 8 bits: a norm is rounded to its code, for which its block is looked at, before it
  // divides. What is stored is what steps.
  const bool is_inside = epsilon == EpsilonRule::kInside;
  const V epsilon_inside = is_inside ? s.epsilon : V(0.0f);
  const V epsilon_outside = is_inside ? V(0.0f) : s.epsilon;
  const auto update_block = [&](const auto& tile,
                                float& block_scale) __attribute__((always_inline)) {
    alignas(64) float momentum[kStateBlock], norm[kStateBlock];
    const V old_scale(block_scale);
    V largest(0.0f);
    for (int i = 0; i < kStateBlock; i += kFour) {
      V h[4];
      load_gradients(tile, i, h);
      if (s.clips || decay == DecayRule::kL2) {
        for (int k = 0; k < 4; ++k) {
          h[k] = limited(h[k], load_weight(tile, i + k * V::kLanes), decay, s);
        }
      }
      for (int k = 0; k < 4; ++k) {
        const int e = i + k * V::kLanes;
        V u = decoded_norm(V::load_bits(tile.norm + e), old_scale);
        V m = decoded_ratio<V>(V::load_bits(tile.momentum + e)) * (u + epsilon_outside);
        m = m + (h[k] - m) * s.one_minus_beta_1;
        u = larger_number(abs(h[k]) + epsilon_inside, u * s.beta_2);  // not a NaN of the gradient
        m.store(momentum + e);
        u.store(norm + e);
        largest = larger_number(u, largest);
      }
    }
    float most = largest_lane(largest);
    if (!(most < kPoison)) {
      most = 0.0f;
      for (const float u : norm) most = u < kPoison && u > most ? u : most;
    }
    block_scale = next_block_scale(block_scale, most, beta_2);
    const V new_scale(block_scale), inverse(inverse_scale(block_scale));
    for (int i = 0; i < kStateBlock; i += kFour) {
      V w[4];
      Bits norms[4], ratios[4];
      for (int k = 0; k < 4; ++k) w[k] = load_weight(tile, i + k * V::kLanes);
      if (decay == DecayRule::kDecoupled) {
        for (int k = 0; k < 4; ++k) w[k] = decayed(w[k], decay, s);
      }
      for (int k = 0; k < 4; ++k) {
        const int e = i + k * V::kLanes;
        const Bits rounded = rounded_norm(V::load(norm + e), inverse);
        norms[k] = norm_code<V>(rounded);
        const V ratio = V::load(momentum + e) / (stored_norm(rounded, new_scale) + epsilon_outside);
        w[k] = w[k] - s.rate * ratio;
        ratios[k] = ratio_code(ratio, drawn_for_momentum(e));
      }
      V::store_bytes(norms, tile.norm + i);
      V::store_bytes(ratios, tile.momentum + i);
      store_weights(w, tile, i);
    }
  };

  for_each_tile<storage>(memory, slice,
                         [&](const Tile<storage>& tile, std::int64_t begin)
                             __attribute__((always_inline)) {
                               const std::int64_t first = slice.first_element + begin;
                               if constexpr (rounding == WeightRounding::kStochastic)
                                 of_weights.draw(first / 2);
                               if constexpr (state != StateFormat::kFull)
                                 of_momentum.draw(first / 4);
                               if constexpr (state == StateFormat::k8Bits) {
                                 update_block(tile, memory.norm_scale[begin / kStateBlock]);
                               } else {
                                 update_elements(tile);
                               }
                             });
}

// The average alone, of weights with a remainder.
inline void average_in_tiles(const Arrays& memory, const Scalars& scalars, const Slice& slice) {
  constexpr Storage kStorage{DType::kBFloat16, DType::kBFloat16, StateFormat::kFull,
                             WeightRounding::kRemainder};
  const VectorScalars<F32> s(scalars, 1.0);
  for_each_tile<kStorage>(memory, slice, [&](const Tile<kStorage>& tile, std::int64_t) {
    for (int i = 0; i < kStateBlock; i += F32::kLanes) {
      F32 average = F32::load(tile.average + i);
      update_average(average, load_weight(tile, i), scalars.average_mode, s);
      average.store(tile.average + i);
      if (scalars.overwrite) store_with_remainder(average, tile, i);
    }
  });
}

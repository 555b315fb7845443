// Tiles of kStateBlock elements: their arrays and random numbers, and how weights lie in them.
//
// Included by tiles.inl. A tile is always whole: the last one of a variable is worked on in a copy.

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
    F32::Bits x = (F32::counted() + static_cast<std::uint32_t>(first)) * kWeylStep + keys_.add;
    for (int k = 0; k < count; k += F32::kLanes) {
      F32::store_bits(scrambled(x, keys_), words_ + k);
      x += F32::kLanes * kWeylStep;
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

 private:
  template <class T, class Void>
  static T* at(Void* array, std::int64_t begin) {
    return array == nullptr ? nullptr : static_cast<T*>(array) + begin;
  }
};

// What lies behind four vectors of an array (Note [Prefetch]): each loop asks for what it touches,
// as it goes. Asked for all at once, the lines of a tile are more than a core can wait for. So far
// ahead in caches, too, where these loops, longer than the others, never lost by it.
template <class T>
[[gnu::always_inline]] inline void prefetch_four(const T* p) {
  constexpr int kCacheLine = 64;
  for (int k = 0; k < 4 * F32::kLanes; k += kCacheLine / sizeof(T)) {
    prefetch<F32>(p + k, kAheadInMemory);
  }
}

// Calls body(tile) with copies of the `count` elements that a tile has. The gradient of the others
// is NaN, which the scale of a block does not count.
template <Storage storage, class Body>
void with_copies(const Arrays& memory, std::int64_t begin, std::int64_t count, const Body& body) {
  const Tile<storage> tile(memory, begin);
  struct Array {
    void* original;
    std::size_t itemsize;
    alignas(64) unsigned char copy[kStateBlock * sizeof(float)];
  } arrays[7];  // not initialized: most variables have fewer
  const auto copy_of = [&](int i, auto* original, int others) -> void* {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(original)>>;
    Array& array = arrays[i];
    array.original = const_cast<T*>(original);
    array.itemsize = sizeof(T);
    if (original == nullptr) return nullptr;
    __builtin_memset(array.copy, others, kStateBlock * sizeof(T));
    return __builtin_memcpy(array.copy, original, count * sizeof(T));
  };
  constexpr int kGrad = 1, kZero = 0, kNaN = 0xff;
  const Arrays copies{.param = copy_of(0, tile.param, kZero),
                      .grad = copy_of(kGrad, tile.grad, kNaN),
                      .momentum = copy_of(2, tile.momentum, kZero),
                      .norm = copy_of(3, tile.norm, kZero),
                      .average = copy_of(4, tile.average, kZero),
                      .accumulator = copy_of(5, tile.accumulator, kNaN),
                      .remainder = copy_of(6, tile.remainder, kZero)};
  body(Tile<storage>(copies, 0));
  for (Array& array : arrays) {
    if (array.original == nullptr || &array == &arrays[kGrad]) continue;
    __builtin_memcpy(array.original, array.copy, count * array.itemsize);
  }
}

// Calls body(tile, begin) for the tiles of a slice.
template <Storage storage, class Body>
[[gnu::always_inline]] inline void for_each_tile(const Arrays& memory, const Slice& slice,
                                                 const Body& body) {
  std::int64_t begin = slice.begin;
  for (; begin + kStateBlock <= slice.end; begin += kStateBlock) {
    const Tile<storage> tile(memory, begin);
    body(tile, begin);
  }
  if (begin < slice.end) {
    with_copies<storage>(memory, begin, slice.end - begin,
                         [&](const Tile<storage>& tile) { body(tile, begin); });
  }
}

// The bits of 16-bit numbers at any address: to name a member of one would take an aligned address.
inline std::uint16_t* words(BFloat16* halves) { return reinterpret_cast<std::uint16_t*>(halves); }

// ---- Weights ------------------------------------------------------------------------------------

template <Storage storage>
[[gnu::always_inline]] inline F32 load_weight(const Tile<storage>& tile, int i) {
  if constexpr (storage.rounding == WeightRounding::kRemainder) {
    return joined<F32>(F32::load_bits(words(tile.param + i)), F32::load_bits(tile.remainder + i));
  } else {
    return F32::load(tile.param + i);
  }
}

template <Storage storage>
[[gnu::always_inline]] inline void prefetch_weights(const Tile<storage>& tile, int i) {
  prefetch_four(tile.param + i);
  if constexpr (storage.rounding == WeightRounding::kRemainder) {
    prefetch_four(tile.remainder + i);
  }
}

// Four vectors. `drawn` are the random numbers of a tile, or null: to the nearest, as an average is
// that overwrites the weights.
template <Storage storage>
[[gnu::always_inline]] inline void store_weights(const F32 (&w)[4], const Tile<storage>& tile,
                                                 int i, const std::uint16_t* drawn) {
  if constexpr (storage.rounding == WeightRounding::kRemainder) {
    F32::Bits halves[4], remainders[4];
    for (int k = 0; k < 4; ++k) {
      halves[k] = half_nearest_away(w[k]);
      remainders[k] = remainder_of(w[k]);
    }
    F32::store_halves(halves, words(tile.param + i));
    F32::store_halves(remainders, reinterpret_cast<std::uint16_t*>(tile.remainder + i));
    return;
  }
  if constexpr (storage.rounding == WeightRounding::kStochastic) {
    if (drawn != nullptr) {
      F32::Bits halves[4];
      for (int k = 0; k < 4; ++k) {
        halves[k] = half_at_random(w[k], F32::load_bits(drawn + i + k * F32::kLanes));
      }
      return F32::store_halves(halves, words(tile.param + i));
    }
  }
  for (int k = 0; k < 4; ++k) w[k].store(tile.param + i + k * F32::kLanes);
}

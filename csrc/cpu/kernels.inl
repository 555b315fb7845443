// The loops around the formula, written once; each kernel unit compiles them for its own vectors.
//
// Included inside an unnamed namespace in which F32 and F64 are the vectors of that unit, so that
// no template compiled under one unit's flags can be merged with another's.

// How a vector reaches memory: whole, or the first `count` elements through a small buffer. Loops
// run the same body with both, so that a tail is computed by the same expression as everything
// else.
struct Whole {
  template <class V, class S>
  [[gnu::always_inline]] static V load(const S* p) {
    return V::load(p);
  }
  template <class V, class S>
  [[gnu::always_inline]] static void store(V v, S* p) {
    v.store(p);
  }
};

struct Partial {
  int count;

  template <class V, class S>
  [[gnu::always_inline]] V load(const S* p) const {
    S buffer[V::kLanes] = {};
    __builtin_memcpy(buffer, p, count * sizeof(S));
    return V::load(buffer);
  }
  template <class V, class S>
  [[gnu::always_inline]] void store(V v, S* p) const {
    S buffer[V::kLanes];
    v.store(buffer);
    __builtin_memcpy(p, buffer, count * sizeof(S));
  }
};

template <class V, class Body>
[[gnu::always_inline]] inline void for_each_vector(const Slice& slice, const Body& body) {
  const std::int64_t end = slice.end;
  std::int64_t i = slice.begin;
  for (; i + V::kLanes <= end; i += V::kLanes) body(Whole{}, i);
  if (i < end) body(Partial{static_cast<int>(end - i)}, i);
}

// Note [Prefetch]: the hardware prefetchers stop at every 4 KiB page, and one to six streams share
// them. Asking for each line a few early, `ahead` in bytes, keeps memory busy across pages. A
// prefetch past the end of an array does not fault and reads nothing.
template <class V, class S>
[[gnu::always_inline]] inline void prefetch(const S* p, std::int64_t ahead) {
  if constexpr (V::kLanes > 1) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead, 0, 3);
  }
}

template <class Compute>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = F32;
};
template <>
struct VectorOf<double> {
  using Type = F64;
};

// Which arrays a loop touches. A gradient that is not there, beside an accumulator, is zero.
struct Touched {
  bool grad, average, accumulator;
};

template <Storage storage, Touched touched, DecayRule decay, EpsilonRule epsilon>
void update_loop(const Arrays& memory, const Scalars& scalars, const Slice& slice) {
  using T = typename TypeOf<storage.param>::Compute;
  using V = typename VectorOf<T>::Type;
  using Param = typename TypeOf<storage.param>::Stored;
  using State = T;
  auto* const param = static_cast<Param*>(memory.param);
  auto* const grad = static_cast<const typename TypeOf<storage.grad>::Stored*>(memory.grad);
  auto* const momentum = static_cast<State*>(memory.momentum);
  auto* const norm = static_cast<State*>(memory.norm);
  auto* const averages = static_cast<State*>(memory.average);
  auto* const accumulator = static_cast<State*>(memory.accumulator);
  const VectorScalars<V> s(scalars, slice.clip);
  const std::int64_t ahead = slice.ahead;
  const AverageMode mode = scalars.average_mode;
  const bool overwrite = scalars.overwrite;

  for_each_vector<V>(slice, [&](auto access, std::int64_t i) __attribute__((always_inline)) {
    prefetch<V>(param + i, ahead);
    if constexpr (touched.grad) prefetch<V>(grad + i, ahead);
    prefetch<V>(momentum + i, ahead);
    prefetch<V>(norm + i, ahead);
    V h(T(0));
    if constexpr (touched.grad) {
      h = access.template load<V>(grad + i);
      if (s.unscales) h = h * s.grad_scale;
    }
    V w = access.template load<V>(param + i);
    V m = access.template load<V>(momentum + i);
    V u = access.template load<V>(norm + i);
    if constexpr (touched.accumulator) {
      prefetch<V>(accumulator + i, ahead);
      h = (access.template load<V>(accumulator + i) + h) * s.mean_scale;
      access.store(V(T(0)), accumulator + i);
    }
    update(w, h, m, u, decay, epsilon, s);
    access.store(m, momentum + i);
    access.store(u, norm + i);
    if constexpr (touched.average) {
      prefetch<V>(averages + i, ahead);
      w = w.rounded_to(param);
      V average = access.template load<V>(averages + i);
      update_average(average, w, mode, s);
      access.store(average, averages + i);
      if (overwrite) w = average;
    }
    access.store(w, param + i);
  });
}

template <Storage storage, Touched touched>
void update_by_rule(const Arrays& memory, const Scalars& scalars, const Slice& slice) {
  const auto run = [&]<DecayRule decay>() {
    if (scalars.epsilon_rule == EpsilonRule::kInside) {
      update_loop<storage, touched, decay, EpsilonRule::kInside>(memory, scalars, slice);
    } else {
      update_loop<storage, touched, decay, EpsilonRule::kOutside>(memory, scalars, slice);
    }
  };
  switch (scalars.decay_rule) {
    case DecayRule::kNone:
      return run.template operator()<DecayRule::kNone>();
    case DecayRule::kDecoupled:
      return run.template operator()<DecayRule::kDecoupled>();
    case DecayRule::kL2:
      return run.template operator()<DecayRule::kL2>();
  }
}

template <Storage storage, bool average, bool accumulator>
void update_variable(const Arrays& memory, const Scalars& scalars, const Slice& slice) {
  // A gradient that is not there has the type of the accumulator.
  if constexpr (accumulator && storage.grad == compute_dtype(storage.param)) {
    if (memory.grad == nullptr) {
      return update_by_rule<storage, Touched{false, average, true}>(memory, scalars, slice);
    }
  }
  update_by_rule<storage, Touched{true, average, accumulator}>(memory, scalars, slice);
}

// accumulator += grad * grad_scale
template <DType grad_dtype>
void accumulate_loop(const Arrays& memory, const Scalars& scalars, const Slice& slice) {
  using T = typename TypeOf<grad_dtype>::Compute;
  using V = typename VectorOf<T>::Type;
  auto* const grad = static_cast<const typename TypeOf<grad_dtype>::Stored*>(memory.grad);
  auto* const accumulator = static_cast<T*>(memory.accumulator);
  const VectorScalars<V> s(scalars, 1.0);
  const std::int64_t ahead = slice.ahead;
  for_each_vector<V>(slice, [&](auto access, std::int64_t i) __attribute__((always_inline)) {
    prefetch<V>(grad + i, ahead);
    prefetch<V>(accumulator + i, ahead);
    const V h = access.template load<V>(grad + i) * s.grad_scale;
    access.store(access.template load<V>(accumulator + i) + h, accumulator + i);
  });
}

// The average alone, for variables without a gradient.
template <DType dtype>
void average_loop(const Arrays& memory, const Scalars& scalars, const Slice& slice) {
  using T = typename TypeOf<dtype>::Compute;
  using V = typename VectorOf<T>::Type;
  auto* const param = static_cast<typename TypeOf<dtype>::Stored*>(memory.param);
  auto* const averages = static_cast<T*>(memory.average);
  const VectorScalars<V> s(scalars, 1.0);
  for_each_vector<V>(slice, [&](auto access, std::int64_t i) __attribute__((always_inline)) {
    V average = access.template load<V>(averages + i);
    update_average(average, access.template load<V>(param + i), scalars.average_mode, s);
    access.store(average, averages + i);
    if (scalars.overwrite) access.store(average, param + i);
  });
}

#include "cpu/tiles.inl"

template <DType grad_dtype, bool asks_finite, bool has_grad>
bool squares_loop(const Arrays& memory, std::int64_t begin, std::int64_t end,
                  const Scalars& scalars, double* block_sums) {
  using T = typename TypeOf<grad_dtype>::Compute;
  using V = typename VectorOf<T>::Type;
  auto* const grad = static_cast<const typename TypeOf<grad_dtype>::Stored*>(memory.grad);
  auto* const accumulator = static_cast<const T*>(memory.accumulator);
  const VectorScalars<V> s(scalars, 1.0);
  constexpr int kRegisters = kLanes / F64::kLanes;
  constexpr int kWide = V::kLanes / F64::kLanes;  // registers of doubles that one V widens to
  V zero_if_finite(T(0));                         // NaN once x - x was not 0

  for (std::int64_t block = begin; block < end; block += kBlock) {
    const std::int64_t block_end = block + kBlock < end ? block + kBlock : end;
    F64 sums[kRegisters];
    for (F64& sum : sums) sum = F64(0.0);

    // A row of kLanes elements at a time; beyond the end a row is zero, which adds nothing.
    const auto add_row = [&](std::int64_t row, auto access_at) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int part = 0; part < kRegisters / kWide; ++part) {
        const std::int64_t i = row + part * V::kLanes;
        const auto access = access_at(i);
        V h(T(0));
        if constexpr (has_grad) {
          prefetch<V>(grad + i, kAheadInCaches);
          h = access.template load<V>(grad + i);
          if constexpr (asks_finite) zero_if_finite = zero_if_finite + (h - h);
          if (s.unscales) h = h * s.grad_scale;
        }
        if (accumulator != nullptr) {
          prefetch<V>(accumulator + i, kAheadInCaches);
          h = (access.template load<V>(accumulator + i) + h) * s.mean_scale;
        }
        F64 wide[kWide];
        widen(h, wide);
#pragma GCC unroll 16
        for (int j = 0; j < kWide; ++j) {
          F64& sum = sums[part * kWide + j];
          sum = sum + wide[j] * wide[j];
        }
      }
    };
    std::int64_t row = block;
    for (; row + kLanes <= block_end; row += kLanes) {
      add_row(row, [](std::int64_t) __attribute__((always_inline)) { return Whole{}; });
    }
    if (row < block_end) {
      add_row(row, [&](std::int64_t i) __attribute__((always_inline)) {
        const std::int64_t left = block_end - i;
        return Partial{static_cast<int>(left < 0 ? 0 : left < V::kLanes ? left : V::kLanes)};
      });
    }

    double lanes[kLanes];
    for (int j = 0; j < kRegisters; ++j) sums[j].store(lanes + j * F64::kLanes);
    *block_sums++ = fold_lanes(lanes);
  }
  T lanes[V::kLanes];
  zero_if_finite.store(lanes);
  bool is_finite = true;
  for (const T lane : lanes) is_finite = is_finite && lane == T(0);
  return is_finite;
}

template <DType grad_dtype, bool asks_finite>
bool sum_squares(const Arrays& memory, std::int64_t begin, std::int64_t end, const Scalars& scalars,
                 double* block_sums) {
  const auto loop = memory.grad != nullptr ? squares_loop<grad_dtype, asks_finite, true>
                                           : squares_loop<grad_dtype, asks_finite, false>;
  return loop(memory, begin, end, scalars, block_sums);
}

template <Storage storage>
constexpr void fill_updates(Kernel (&update)[2][2]) {
  if constexpr (is_plain(storage)) {
    update[0][0] = update_variable<storage, false, false>;
    update[0][1] = update_variable<storage, false, true>;
    update[1][0] = update_variable<storage, true, false>;
    update[1][1] = update_variable<storage, true, true>;
  } else if constexpr (exists(storage)) {
    for (auto& by_accumulator : update) {
      for (Kernel& kernel : by_accumulator) kernel = update_in_tiles<storage>;
    }
  }
}

template <int... storages, int... dtypes>
constexpr KernelTable fill_table(const char* isa, const char* features,
                                 std::integer_sequence<int, storages...>,
                                 std::integer_sequence<int, dtypes...>) {
  KernelTable table{};
  table.isa = isa;
  table.features = features;
  (fill_updates<storage_at(storages)>(table.update[storages]), ...);
  ((table.accumulate[dtypes] = accumulate_loop<static_cast<DType>(dtypes)>), ...);
  ((table.average[dtypes][0] = average_loop<static_cast<DType>(dtypes)>), ...);
  table.average[static_cast<int>(DType::kBFloat16)][1] = average_in_tiles;
  ((table.squares[dtypes][0] = sum_squares<static_cast<DType>(dtypes), false>), ...);
  ((table.squares[dtypes][1] = sum_squares<static_cast<DType>(dtypes), true>), ...);
  return table;
}

constexpr KernelTable make_table(const char* isa, const char* features) {
  return fill_table(isa, features, std::make_integer_sequence<int, kNumStorages>{},
                    std::make_integer_sequence<int, kNumDTypes>{});
}

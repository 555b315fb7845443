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
[[gnu::always_inline]] inline void for_each_vector(std::int64_t begin, std::int64_t end,
                                                   const Body& body) {
  std::int64_t i = begin;
  for (; i + V::kLanes <= end; i += V::kLanes) body(Whole{}, i);
  if (i < end) body(Partial{static_cast<int>(end - i)}, i);
}

// Note [Prefetch]: the hardware prefetchers stop at every 4 KiB page, and one to six streams share
// them. Asking for each line a few early keeps memory busy across pages; bench/cpp measured 64 to
// 8192 bytes. A prefetch past the end of an array does not fault and reads nothing.
constexpr std::int64_t kPrefetchBytes = 384;

template <class V, class S>
[[gnu::always_inline]] inline void prefetch(const S* p) {
  if constexpr (V::kLanes > 1) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes, 0, 3);
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

template <DTypePair pair, Rule rule>
void update_loop(const Streams& streams, std::int64_t begin, std::int64_t end,
                 const StepScalars& scalars, double clip) {
  using T = typename TypeOf<pair.param>::Compute;
  using V = typename VectorOf<T>::Type;
  auto* const param = static_cast<typename TypeOf<pair.param>::Storage*>(streams.param);
  auto* const grad = static_cast<const typename TypeOf<pair.grad>::Storage*>(streams.grad);
  auto* const momentum = static_cast<T*>(streams.momentum);
  auto* const norm = static_cast<T*>(streams.norm);
  auto* const averages = static_cast<T*>(streams.average);
  auto* const accumulator = static_cast<T*>(streams.accumulator);
  const VectorScalars<V> s(scalars, clip);
  const AverageMode mode = scalars.average_mode;
  const bool overwrite = scalars.overwrite;

  for_each_vector<V>(begin, end, [&](auto memory, std::int64_t i) __attribute__((always_inline)) {
    prefetch<V>(param + i);
    prefetch<V>(grad + i);
    prefetch<V>(momentum + i);
    prefetch<V>(norm + i);
    V h = memory.template load<V>(grad + i);
    if (s.unscales) h = h * s.grad_scale;
    V w = memory.template load<V>(param + i);
    V m = memory.template load<V>(momentum + i);
    V u = memory.template load<V>(norm + i);
    if constexpr (rule.accumulator) {
      prefetch<V>(accumulator + i);
      h = (memory.template load<V>(accumulator + i) + h) * s.mean_scale;
      memory.store(V(T(0)), accumulator + i);
    }
    update(w, h, m, u, rule, s);
    memory.store(m, momentum + i);
    memory.store(u, norm + i);
    if constexpr (rule.average) {
      prefetch<V>(averages + i);
      w = w.rounded_to(param);
      V average = memory.template load<V>(averages + i);
      update_average(average, w, mode, s);
      memory.store(average, averages + i);
      if (overwrite) w = average;
    }
    memory.store(w, param + i);
  });
}

template <DType grad_dtype>
void accumulate_loop(const Streams& streams, std::int64_t begin, std::int64_t end,
                     const StepScalars& scalars) {
  using T = typename TypeOf<grad_dtype>::Compute;
  using V = typename VectorOf<T>::Type;
  auto* const grad = static_cast<const typename TypeOf<grad_dtype>::Storage*>(streams.grad);
  auto* const accumulator = static_cast<T*>(streams.accumulator);
  const VectorScalars<V> s(scalars, 1.0);
  for_each_vector<V>(begin, end, [&](auto memory, std::int64_t i) __attribute__((always_inline)) {
    prefetch<V>(grad + i);
    prefetch<V>(accumulator + i);
    const V h = memory.template load<V>(grad + i) * s.grad_scale;
    memory.store(memory.template load<V>(accumulator + i) + h, accumulator + i);
  });
}

template <DType dtype>
void average_loop(const Streams& streams, std::int64_t begin, std::int64_t end,
                  const StepScalars& scalars) {
  using T = typename TypeOf<dtype>::Compute;
  using V = typename VectorOf<T>::Type;
  auto* const param = static_cast<typename TypeOf<dtype>::Storage*>(streams.param);
  auto* const averages = static_cast<T*>(streams.average);
  const VectorScalars<V> s(scalars, 1.0);
  for_each_vector<V>(begin, end, [&](auto memory, std::int64_t i) __attribute__((always_inline)) {
    V average = memory.template load<V>(averages + i);
    update_average(average, memory.template load<V>(param + i), scalars.average_mode, s);
    memory.store(average, averages + i);
    if (scalars.overwrite) memory.store(average, param + i);
  });
}

template <DType grad_dtype>
void squares_loop(const Streams& streams, std::int64_t begin, std::int64_t end,
                  const StepScalars& scalars, double* block_sums) {
  using T = typename TypeOf<grad_dtype>::Compute;
  using V = typename VectorOf<T>::Type;
  auto* const grad = static_cast<const typename TypeOf<grad_dtype>::Storage*>(streams.grad);
  auto* const accumulator = static_cast<const T*>(streams.accumulator);
  const VectorScalars<V> s(scalars, 1.0);
  constexpr int kRegisters = kLanes / F64::kLanes;
  constexpr int kWide = V::kLanes / F64::kLanes;  // registers of doubles that one V widens to

  for (std::int64_t block = begin; block < end; block += kBlock) {
    const std::int64_t block_end = block + kBlock < end ? block + kBlock : end;
    F64 sums[kRegisters];
    for (F64& sum : sums) sum = F64(0.0);

    // A row of kLanes elements at a time; beyond the end a row is zero, which adds nothing.
    const auto add_row = [&](std::int64_t row, auto memory_at) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int part = 0; part < kRegisters / kWide; ++part) {
        const std::int64_t i = row + part * V::kLanes;
        const auto memory = memory_at(i);
        prefetch<V>(grad + i);
        V h = memory.template load<V>(grad + i);
        if (s.unscales) h = h * s.grad_scale;
        if (accumulator != nullptr) {
          prefetch<V>(accumulator + i);
          h = (memory.template load<V>(accumulator + i) + h) * s.mean_scale;
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
}

template <int pair, int... rules>
constexpr void fill_updates(KernelTable& table, std::integer_sequence<int, rules...>) {
  ((table.update[pair][rules] = update_loop<kPairs[pair], rule_at(rules)>), ...);
}

template <int... pairs, int... dtypes>
constexpr KernelTable fill_table(const char* isa, std::integer_sequence<int, pairs...>,
                                 std::integer_sequence<int, dtypes...>) {
  KernelTable table{};
  table.isa = isa;
  (fill_updates<pairs>(table, std::make_integer_sequence<int, kNumRules>{}), ...);
  ((table.accumulate[dtypes] = accumulate_loop<static_cast<DType>(dtypes)>), ...);
  ((table.squares[dtypes] = squares_loop<static_cast<DType>(dtypes)>), ...);
  ((table.average[dtypes] = average_loop<static_cast<DType>(dtypes)>), ...);
  return table;
}

constexpr KernelTable make_table(const char* isa) {
  return fill_table(isa, std::make_integer_sequence<int, kNumPairs>{},
                    std::make_integer_sequence<int, kNumDTypes>{});
}

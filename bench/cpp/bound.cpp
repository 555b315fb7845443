// The physical limit of a pass over memory: the same loads and stores, and nothing else.
#include "bound.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

#include "cpu/pool.hpp"

namespace {

constexpr std::int64_t kChunk = 65536;  // elements, as in the step
constexpr int kMaxStreams = 6;

// The widest vector of the machine.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
using Vector [[gnu::vector_size(kVectorBytes), gnu::aligned(1), gnu::may_alias]] = std::uint32_t;
struct Stream {
  int bytes_per_element = 0;
  bool written = false;
};

// The streams of a pass, known to the compiler.
struct Shape {
  int count = 0;
  std::array<Stream, kMaxStreams> streams{};
};

// Elements that fill a vector with the narrowest type.
constexpr int unit_of(const Shape& shape) {
  int narrowest = shape.streams[0].bytes_per_element;
  for (int s = 1; s < shape.count; ++s) {
    narrowest = std::min(narrowest, shape.streams[s].bytes_per_element);
  }
  return kVectorBytes / narrowest;
}

constexpr Shape norm_shape(int grad) { return {1, {{{grad, false}}}}; }
constexpr Shape accumulate_shape(int state, int grad) {
  return {2, {{{state, true}, {grad, false}}}};
}
constexpr Shape step_shape(int param, int grad, int states) {
  Shape shape{2 + states, {{{param, true}, {grad, false}}}};
  for (int i = 0; i < states; ++i) shape.streams[2 + i] = {param == 8 ? 8 : 4, true};
  return shape;
}

// With state in fewer bytes, and perhaps what a weight of two bytes does not hold.
constexpr Shape low_shape(int param, int state, bool remainder) {
  return {4 + remainder,
          {{{param, true}, {param, false}, {state, true}, {state, true}, {2, remainder}}}};
}

constexpr auto kShapes = [] {
  std::array<Shape, 3 + 3 + 5 * 3 + 7> shapes{};
  int next = 0;
  for (const int bytes : {2, 4, 8}) shapes[next++] = norm_shape(bytes);
  shapes[next++] = accumulate_shape(4, 2);
  shapes[next++] = accumulate_shape(4, 4);
  shapes[next++] = accumulate_shape(8, 8);
  for (const auto& [param, grad] : {std::pair(4, 4), {4, 2}, {2, 2}, {2, 4}, {8, 8}}) {
    for (const int states : {2, 3, 4}) shapes[next++] = step_shape(param, grad, states);
  }
  for (const int state : {2, 1}) {
    shapes[next++] = low_shape(4, state, false);
    shapes[next++] = low_shape(2, state, false);
    shapes[next++] = low_shape(2, state, true);
  }
  shapes[next++] = low_shape(2, 4, true);
  return shapes;
}();

volatile std::uint32_t runtime_zero = 0;
volatile std::uint32_t sink;

// All loads of a unit come before its stores, as in the step. Integers, and `zero` is 0 at run time
// alone: memory keeps its bits, and no float is slow. `ahead`: how many bytes early each stream's
// lines are asked for; 0: not at all.
template <Shape shape, int ahead>
void pass(char* const* data, std::int64_t begin, std::int64_t end, std::uint32_t zero) {
  constexpr int kUnit = unit_of(shape);
  Vector read{};
  for (std::int64_t i = begin; i < end; i += kUnit) {
    Vector held[kMaxStreams][8 * kUnit / sizeof(Vector)];
#pragma GCC unroll 6
    for (int s = 0; s < shape.count; ++s) {
      const int bytes = shape.streams[s].bytes_per_element;
      const char* const p = data[s] + i * bytes;
#pragma GCC unroll 4
      for (std::size_t v = 0; v < bytes * kUnit / sizeof(Vector); ++v) {
        if constexpr (ahead > 0) __builtin_prefetch(p + v * sizeof(Vector) + ahead);
        held[s][v] = *reinterpret_cast<const Vector*>(p + v * sizeof(Vector));
      }
    }
#pragma GCC unroll 6
    for (int s = 0; s < shape.count; ++s) {
      const int bytes = shape.streams[s].bytes_per_element;
      char* const p = data[s] + i * bytes;
#pragma GCC unroll 4
      for (std::size_t v = 0; v < bytes * kUnit / sizeof(Vector); ++v) {
        if (shape.streams[s].written) {
          *reinterpret_cast<Vector*>(p + v * sizeof(Vector)) = held[s][v] + zero;
        } else {
          read |= held[s][v];
        }
      }
    }
  }
  sink = read[0];  // so that reads are not left out
}

using Pass = void (*)(char* const*, std::int64_t, std::int64_t, std::uint32_t);
struct Compiled {
  Shape shape;
  std::array<Pass, 4> passes;
};
constexpr auto kCompiled = []<std::size_t... i>(std::index_sequence<i...>) {
  return std::array{Compiled{kShapes[i],
                             {pass<kShapes[i], 0>, pass<kShapes[i], 384>, pass<kShapes[i], 1024>,
                              pass<kShapes[i], 2048>}}...};
}(std::make_index_sequence<kShapes.size()>{});

}  // namespace

int bound_variants() { return 8; }

int bound_pass(const bound_stream* streams, int count, std::int64_t elements, int threads,
               int variant) {
  const auto compiled = std::ranges::find_if(kCompiled, [&](const Compiled& candidate) {
    return candidate.shape.count == count &&
           std::equal(streams, streams + count, candidate.shape.streams.begin(),
                      [](const bound_stream& a, const Stream& b) {
                        return a.bytes_per_element == b.bytes_per_element &&
                               (a.written != 0) == b.written;
                      });
  });
  if (compiled == kCompiled.end()) return 0;
  const Pass run = compiled->passes[variant / 2];
  const std::int64_t part =
      variant % 2 == 0 ? kChunk : (elements / 64 + threads - 1) / threads * 64;
  char* data[kMaxStreams];
  for (int s = 0; s < count; ++s) data[s] = static_cast<char*>(streams[s].data);
  const std::uint32_t zero = runtime_zero;
  if (threads == 1) {
    run(data, 0, elements, zero);
    return 1;
  }
  std::atomic<std::int64_t> next{0};
  auto work = [&] {
    for (std::int64_t begin; (begin = next.fetch_add(part)) < elements;) {
      run(data, begin, std::min(begin + part, elements), zero);
    }
  };
  adamax::cpu::run_on_pool([](void* work_) { (*static_cast<decltype(work)*>(work_))(); }, &work,
                           threads, 0);
  return 1;
}

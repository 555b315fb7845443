// How a thread reaches memory: packets of 16 bytes, single elements, or bytes, as it is aligned.
//
// The alignment is decided once a chunk and all threads of a block take the same way, so that no
// branch stands between two loads: they wait for memory together.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/host_device.hpp"
#include "core/vec_scalar.hpp"
#include "cuda/tables.hpp"

namespace adamax::cuda {

constexpr int kThreads = 256;  // of a block

struct alignas(16) [[gnu::may_alias]] Packet {
  std::uint32_t words[4];
};

// Elements of one thread, so that the narrowest stream fills a packet.
template <class A, class B>
constexpr int kWidth = sizeof(Packet) / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

// `width` elements, read and written in units that lie at multiples of their size, as a GPU
// demands. The unit void is an element.
template <class AnyUnit, int width_>
struct Access {
  static constexpr int width = width_;
  template <class S>
  using Unit = std::conditional_t<std::is_void_v<AnyUnit>, S, AnyUnit>;
  template <class S>
  static constexpr int kUnits = width * sizeof(S) / sizeof(Unit<S>);

  template <class V, class S>
  ADAMAX_HOST_DEVICE static void load(const S* p, V (&vectors)[width]) {
    S elements[width];
    Unit<S> units[kUnits<S>];
    for (int i = 0; i < kUnits<S>; ++i) units[i] = reinterpret_cast<const Unit<S>*>(p)[i];
    __builtin_memcpy(elements, units, sizeof(elements));
    for (int k = 0; k < width; ++k) vectors[k] = V(scalar::to_compute(elements[k]));
  }
  template <class V, class S>
  ADAMAX_HOST_DEVICE static void store(const V (&vectors)[width], S* p) {
    S elements[width];
    Unit<S> units[kUnits<S>];
    for (int k = 0; k < width; ++k) scalar::to_storage(vectors[k].v, elements[k]);
    __builtin_memcpy(units, elements, sizeof(elements));
    for (int i = 0; i < kUnits<S>; ++i) reinterpret_cast<Unit<S>*>(p)[i] = units[i];
  }
};
using ByElement = Access<void, 1>;
using ByByte = Access<unsigned char, 1>;

template <class S>
ADAMAX_HOST_DEVICE bool is_aligned(const S* p, std::uintptr_t bytes = sizeof(S)) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

// Calls body(access, i) for the elements of a stretch that are a thread's: `width` of them where
// all of `memory`, in which null stands for nothing, lies in packets; else, and at the end, one by
// one.
template <int width, class Body, class... S>
ADAMAX_HOST_DEVICE void for_each(Stretch stretch, std::uint32_t thread, const Body& body,
                                 const S*... memory) {
  const bool in_packets = (is_aligned(memory, sizeof(Packet)) && ...);
  const std::int64_t rest =
      in_packets ? stretch.end - (stretch.end - stretch.begin) % width : stretch.begin;
  for (std::int64_t i = stretch.begin + std::int64_t{thread} * width; i < rest;
       i += kThreads * width) {
    body(Access<Packet, width>{}, i);
  }
  const auto one_by_one = [&](auto access) {
#ifdef __CUDA_ARCH__
#pragma unroll 1  // the stores between make it useless
#endif
    for (std::int64_t i = rest + thread; i < stretch.end; i += kThreads) body(access, i);
  };
  (is_aligned(memory) && ...) ? one_by_one(ByElement{}) : one_by_one(ByByte{});
}

// Calls body(access, i) for every `step`-th element from `begin` on, so many at a time that their
// loads wait for memory together: `access` loads kColumn of them, or, at the end, one.
constexpr int kColumn = 16;

template <class One, int step, int count>
struct Column {
  static constexpr int width = count;

  template <class V, class S>
  ADAMAX_HOST_DEVICE static void load(const S* p, V (&vectors)[count]) {
    for (int k = 0; k < count; ++k) {
      V element[1];
      One::load(p + k * step, element);
      vectors[k] = element[0];
    }
  }
};

template <class One, int step, class Body>
ADAMAX_HOST_DEVICE void for_each_column(std::int64_t begin, std::int64_t end, const Body& body) {
  std::int64_t i = begin;
  for (; i + (kColumn - 1) * step < end; i += kColumn * step) {
    body(Column<One, step, kColumn>{}, i);
  }
  for (; i < end; i += step) body(Column<One, step, 1>{}, i);
}

}  // namespace adamax::cuda

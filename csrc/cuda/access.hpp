// How a thread reaches memory: packets of several elements, single elements, or bytes, as it is
// aligned.
//
// The alignment is decided once a chunk and all threads of a block take the same way, so that no
// branch stands between two loads: they wait for memory together.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"
#include "core/vec_scalar.hpp"

namespace adamax::cuda {

// Elements at an address that is a multiple of `alignment`: so many bytes a GPU moves by one
// instruction.
template <class S, int width, int alignment>
struct [[gnu::packed, gnu::may_alias]] alignas(alignment) Packet {
  S elements[width];
};

// `width` elements, read and written as one packet, or byte by byte.
template <int width_, bool by_byte = false>
struct Access {
  static constexpr int width = width_;
  template <class S>
  using PacketOf = Packet<S, width, by_byte ? 1 : width * sizeof(S)>;

  template <class V, class S>
  ADAMAX_HOST_DEVICE static void load(const S* p, V (&vectors)[width]) {
    const auto packet = *reinterpret_cast<const PacketOf<S>*>(p);
    for (int k = 0; k < width; ++k) read(S{packet.elements[k]}, vectors[k]);
  }
  template <class V, class S>
  ADAMAX_HOST_DEVICE static void store(const V (&vectors)[width], S* p) {
    PacketOf<S> packet;
    for (int k = 0; k < width; ++k) {
      S element;
      write(vectors[k], element);
      packet.elements[k] = element;
    }
    *reinterpret_cast<PacketOf<S>*>(p) = packet;
  }

 private:
  // Numbers, or bits of integers, of which the sign of a signed one is extended.
  template <class T, class S>
  ADAMAX_HOST_DEVICE static void read(S stored, scalar::Vec<T>& x) {
    x = scalar::Vec<T>(scalar::to_compute(stored));
  }
  template <class S>
  ADAMAX_HOST_DEVICE static void read(S stored, std::uint32_t& bits) {
    bits = static_cast<std::uint32_t>(stored);
  }
  ADAMAX_HOST_DEVICE static void read(BFloat16 stored, std::uint32_t& bits) { bits = stored.bits; }
  template <class T, class S>
  ADAMAX_HOST_DEVICE static void write(scalar::Vec<T> x, S& stored) {
    scalar::to_storage(x.v, stored);
  }
  template <class S>
  ADAMAX_HOST_DEVICE static void write(std::uint32_t bits, S& stored) {
    stored = static_cast<S>(bits);
  }
  ADAMAX_HOST_DEVICE static void write(std::uint32_t bits, BFloat16& stored) {
    stored.bits = static_cast<std::uint16_t>(bits);
  }
};
using ByElement = Access<1>;
using ByByte = Access<1, true>;

enum class Alignment : std::uint8_t { kPackets, kElements, kBytes };

// Of streams of which a thread takes `width` elements at a time; null stands for none.
template <int width, class... S>
ADAMAX_HOST_DEVICE Alignment alignment_of(const S*... streams) {
  const auto lie_at = [](auto... remainders) { return (remainders | ...) == 0; };
  const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  if (lie_at(address(streams) % (width * sizeof(S))...)) return Alignment::kPackets;
  return lie_at(address(streams) % sizeof(S)...) ? Alignment::kElements : Alignment::kBytes;
}

// The elements of a row that a chunk stands for.
struct Stretch {
  std::int64_t begin;
  int count;
};

// Calls body(access, i) for the elements i of a stretch that are a thread's: a packet of `width`,
// where the alignment allows; else, and at the end of a row, one by one.
//
// A stretch has a packet for each thread and no more: stores would stand between the loads of two,
// and a small array is spread over as many blocks as it can be.
template <int width, int threads, class Body>
ADAMAX_HOST_DEVICE void for_each(Stretch stretch, int thread, Alignment alignment,
                                 const Body& body) {
  const auto [begin, count] = stretch;
  const int rest = alignment == Alignment::kPackets ? count - count % width : 0;
  if (thread * width < rest) body(Access<width>{}, begin + thread * width);
  const auto one_by_one = [&, begin = begin, count = count](auto access) {
#ifdef __CUDA_ARCH__
#pragma unroll 1  // the stores between make it useless
#endif
    // From the last thread on, which has no packet where a row ends.
    for (int k = rest + threads - 1 - thread; k < count; k += threads) body(access, begin + k);
  };
  alignment != Alignment::kBytes ? one_by_one(ByElement{}) : one_by_one(ByByte{});
}

// Every `step`-th element from one on, loaded together: `width` of them, or, at the end of a
// stretch, those up to the `last`. The others read that one in their place, because a load that may
// not take place would stand between the others.
template <class One, int step, int width_, bool is_whole>
struct Column {
  static constexpr int width = width_;
  int last;

  ADAMAX_HOST_DEVICE bool has(int k) const { return is_whole || k <= last; }

  template <class V, class S>
  ADAMAX_HOST_DEVICE void load(const S* p, V (&vectors)[width]) const {
    for (int k = 0; k < width; ++k) {
      V element[1];
      One::load(p + (is_whole || k < last ? k : last) * step, element);
      vectors[k] = element[0];
    }
  }
};

// Calls body(column, i) for the columns of every `step`-th element of a stretch from its `first`
// on. Those at the end are narrower: they keep an address for each of their elements.
template <class One, int step, int width, class Body>
ADAMAX_HOST_DEVICE void for_each_column(Stretch stretch, int first, const Body& body) {
  int k = first;
  for (; k + (width - 1) * step < stretch.count; k += width * step) {
    body(Column<One, step, width, true>{}, stretch.begin + k);
  }
  for (; k < stretch.count; k += width / 2 * step) {
    body(Column<One, step, width / 2, false>{(stretch.count - 1 - k) / step}, stretch.begin + k);
  }
}

}  // namespace adamax::cuda

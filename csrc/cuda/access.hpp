// How a thread reaches memory: vectors of 16 bytes, single elements at the edges, any alignment.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"
#include "core/vec_scalar.hpp"
#include "cuda/tables.hpp"

namespace adamax::cuda {

constexpr int kThreads = 256;  // of a block

struct alignas(16) Packet {
  std::uint32_t words[4];
};

template <class S>
ADAMAX_HOST_DEVICE bool is_aligned(const S* p, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

// Assembly, because the compiler would find that store() below writes the same on both of its ways,
// and write element by element on both.
ADAMAX_HOST_DEVICE void store_packet(Packet packet, Packet* p) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(packet.words[0]), "r"(packet.words[1]), "r"(packet.words[2]),
               "r"(packet.words[3])
               : "memory");
#else
  *p = packet;
#endif
}

// One element; byte by byte where the address is not a multiple of its size, which a GPU refuses.
template <class S>
ADAMAX_HOST_DEVICE S load_element(const S* p) {
  if (is_aligned(p, sizeof(S))) return *p;
  S value;
  for (unsigned i = 0; i < sizeof(S); ++i) {
    reinterpret_cast<unsigned char*>(&value)[i] = reinterpret_cast<const unsigned char*>(p)[i];
  }
  return value;
}

template <class S>
ADAMAX_HOST_DEVICE void store_element(S value, S* p) {
  if (is_aligned(p, sizeof(S))) {
    *p = value;
    return;
  }
  for (unsigned i = 0; i < sizeof(S); ++i) {
    reinterpret_cast<unsigned char*>(p)[i] = reinterpret_cast<const unsigned char*>(&value)[i];
  }
}

// `width` elements of one thread: in packets of 16 bytes if they fill some and lie on their
// boundaries, one by one otherwise. All threads of a block take the same way.
template <class V, class S, int width>
ADAMAX_HOST_DEVICE void load(const S* p, V (&vectors)[width]) {
  constexpr int kPackets = width * sizeof(S) / sizeof(Packet);
  S elements[width];
  if (kPackets > 0 && is_aligned(p, sizeof(Packet))) {
    Packet packets[kPackets > 0 ? kPackets : 1];
    for (int i = 0; i < kPackets; ++i) packets[i] = reinterpret_cast<const Packet*>(p)[i];
    __builtin_memcpy(elements, packets, kPackets * sizeof(Packet));
  } else {
    for (int i = 0; i < width; ++i) elements[i] = load_element(p + i);
  }
  for (int i = 0; i < width; ++i) vectors[i] = V(scalar::to_compute(elements[i]));
}

template <class V, class S, int width>
ADAMAX_HOST_DEVICE void store(const V (&vectors)[width], S* p) {
  constexpr int kPackets = width * sizeof(S) / sizeof(Packet);
  S elements[width];
  for (int i = 0; i < width; ++i) scalar::to_storage(vectors[i].v, elements[i]);
  if (kPackets > 0 && is_aligned(p, sizeof(Packet))) {
    Packet packets[kPackets > 0 ? kPackets : 1];
    __builtin_memcpy(packets, elements, kPackets * sizeof(Packet));
    for (int i = 0; i < kPackets; ++i) store_packet(packets[i], reinterpret_cast<Packet*>(p) + i);
  } else {
    for (int i = 0; i < width; ++i) store_element(elements[i], p + i);
  }
}

// Elements of one thread, so that the narrowest stream fills a packet.
template <class A, class B>
constexpr int kWidth = sizeof(Packet) / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

// Calls body(integer constant, i) for the elements of a chunk that are a thread's: `width` of them,
// or one by one at the end.
template <int width>
struct Width {
  static constexpr int value = width;
};
template <int width, class Body>
ADAMAX_HOST_DEVICE void for_each(Stretch stretch, std::uint32_t thread, const Body& body) {
  for (std::int64_t i = stretch.begin + std::int64_t{thread} * width; i < stretch.end;
       i += kThreads * width) {
    if (i + width <= stretch.end) {
      body(Width<width>{}, i);
    } else {
      for (std::int64_t j = i; j < stretch.end; ++j) body(Width<1>{}, j);
    }
  }
}

}  // namespace adamax::cuda

// How the lanes of a warp share a tile of kStateBlock elements, and reach their own.
#pragma once

#include <cstdint>
#include <type_traits>

#include "adamax/dtypes.hpp"
#include "core/random.hpp"
#include "core/vec_scalar.hpp"
#include "cuda/access.hpp"
#include "cuda/kernels.hpp"

namespace adamax::cuda {

constexpr int kOfLane = static_cast<int>(kStateBlock) / kWarp;  // elements

// The elements of a lane as they lie in memory: each in a register of its own, as conversions would
// leave them, they would be too many.
template <class S>
struct Packed {
  static constexpr int kInWord = static_cast<int>(sizeof(std::uint32_t) / sizeof(S));
  static constexpr int kBits = 8 * static_cast<int>(sizeof(S));
  using Word = std::conditional_t<kBits == 8, std::uint8_t,
                                  std::conditional_t<kBits == 16, std::uint16_t, std::uint32_t>>;
  std::uint32_t words[kOfLane / kInWord];

  ADAMAX_HOST_DEVICE S operator[](int k) const {
    return scalar::bit_cast<S>(static_cast<Word>(words[k / kInWord] >> k % kInWord * kBits));
  }
  // In the order of the elements. To shift and add is one instruction.
  ADAMAX_HOST_DEVICE void set(int k, std::uint32_t bits) {
    std::uint32_t& word = words[k / kInWord];
    word = (k % kInWord == 0 ? 0 : word) + (bits << k % kInWord * kBits);
  }
  ADAMAX_HOST_DEVICE void set(int k, scalar::F32 x) {
    S stored;
    scalar::to_storage(x.v, stored);
    set(k, std::uint32_t{scalar::bit_cast<Word>(stored)});
  }
};

// Which elements of a tile a lane has, and how it reaches them: packets of four, those of a warp
// side by side. All addresses of a stream are one and a constant.
struct LaneOfPackets {
  static constexpr int kWidth = 4;
  using One = ByElement;
  std::int64_t first;  // element
  std::uint32_t lane;

  ADAMAX_HOST_DEVICE LaneOfPackets(std::int64_t tile, std::uint32_t lane)
      : first(tile + lane * kWidth), lane(lane) {}

  template <class S>
  ADAMAX_HOST_DEVICE void load(const S* array, Packed<S>& x, std::uint32_t = 0) const {
    for (int j = 0; j < kPackets; ++j) {
      const auto packet = *reinterpret_cast<const PacketOf<S>*>(array + first + j * kStride);
      for (int k = 0; k < kWords<S>; ++k) x.words[j * kWords<S> + k] = packet.elements[k];
    }
  }
  template <class S>
  ADAMAX_HOST_DEVICE void store(const Packed<S>& x, S* array) const {
    for (int j = 0; j < kPackets; ++j) {
      PacketOf<S> packet;
      for (int k = 0; k < kWords<S>; ++k) packet.elements[k] = x.words[j * kWords<S> + k];
      *reinterpret_cast<PacketOf<S>*>(array + first + j * kStride) = packet;
    }
  }
  // The random numbers of its elements, `in_word` to a word, of which the tile's are from `word`
  // on.
  template <int in_word>
  ADAMAX_HOST_DEVICE void draw(std::uint32_t word, const RandomKeys& keys,
                               std::uint32_t (&words)[kOfLane / in_word]) const {
    constexpr int kInPacket = kWidth / in_word;
    for (int j = 0; j < kOfLane / in_word; ++j) {
      const std::uint32_t constant = j / kInPacket * (kStride / in_word) + j % kInPacket;
      words[j] = random_words(word + lane * kInPacket + constant, keys);
    }
  }

 private:
  static constexpr int kPackets = kOfLane / kWidth, kStride = kWarp * kWidth;
  template <class S>
  static constexpr int kWords = sizeof(S);  // of a packet
  template <class S>
  using PacketOf = Packet<std::uint32_t, kWords<S>, kWidth * sizeof(S)>;
};

// Single elements, of which the tile has `count`; `missing` are the bits of the others.
template <class One_>
struct LaneOfElements {
  using One = One_;
  std::int64_t first;
  std::uint32_t lane, count;

  ADAMAX_HOST_DEVICE LaneOfElements(std::int64_t tile, std::uint32_t lane, std::uint32_t count)
      : first(tile + lane), lane(lane), count(count) {}

  template <class S>
  ADAMAX_HOST_DEVICE void load(const S* array, Packed<S>& x, std::uint32_t missing = 0) const {
    using Word = typename Packed<S>::Word;
    for (int k = 0; k < kOfLane; ++k) {
      std::uint32_t bits[1] = {static_cast<Word>(missing)};
      if (has(k)) One::load(reinterpret_cast<const Word*>(array) + first + k * kWarp, bits);
      x.set(k, bits[0]);
    }
  }
  template <class S>
  ADAMAX_HOST_DEVICE void store(const Packed<S>& x, S* array) const {
    using Word = typename Packed<S>::Word;
    for (int k = 0; k < kOfLane; ++k) {
      const std::uint32_t bits[1] = {scalar::bit_cast<Word>(x[k])};
      if (has(k)) One::store(bits, reinterpret_cast<Word*>(array) + first + k * kWarp);
    }
  }
  template <int in_word>
  ADAMAX_HOST_DEVICE void draw(std::uint32_t word, const RandomKeys& keys,
                               std::uint32_t (&words)[kOfLane / in_word]) const {
    constexpr std::uint32_t kBits = 32 / in_word, kMask = (1u << kBits) - 1;
    for (int k = 0; k < kOfLane; ++k) {
      const std::uint32_t drawn = random_words(word + (lane + k * kWarp) / in_word, keys);
      const std::uint32_t number = drawn >> lane % in_word * kBits & kMask;
      if (k % in_word == 0) words[k / in_word] = 0;
      words[k / in_word] |= number << k % in_word * kBits;
    }
  }

 private:
  ADAMAX_HOST_DEVICE bool has(int k) const { return lane + k * kWarp < count; }
};

// Calls body(lane) with the lane of a thread in the tile that begins at an element.
template <class Body>
ADAMAX_HOST_DEVICE void with_lane(std::int64_t tile, int thread, int count, Alignment alignment,
                                  const Body& body) {
  const std::uint32_t lane = static_cast<std::uint32_t>(thread) % kWarp;
  if (alignment == Alignment::kPackets && count == kStateBlock) {
    body(LaneOfPackets(tile, lane));
  } else if (alignment != Alignment::kBytes) {
    body(LaneOfElements<ByElement>(tile, lane, count));
  } else {
    body(LaneOfElements<ByByte>(tile, lane, count));
  }
}

}  // namespace adamax::cuda

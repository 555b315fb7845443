// Random numbers for rounding: functions of seed, step, variable and element, so the same on every
// machine.
//
// A word is a keyed three-round hash (triple32) of a Weyl sequence; the keys come from
// Philox4x32-10 (Salmon et al. 2011). Element e takes half e % 2 of word e / 2 for its weight and
// byte e % 4 of word e / 4 for its first moment, lowest bits first: two streams, with two keys
// each.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"

namespace adamax {

// Halves and bytes of words are taken as they lie in memory.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

struct RandomKeys {
  std::uint32_t add, exclusive_or;
};

// Whose numbers they are.
struct RandomSource {
  std::uint64_t seed, step;
  std::uint32_t variable;
};

enum class RandomStream : std::uint8_t { kWeights, kMomentum };

// Of the words of one slab of 2^32: of 2^33 elements for weights, of 2^34 for momentum.
ADAMAX_HOST_DEVICE RandomKeys random_keys(const RandomSource& source, RandomStream stream,
                                          std::uint32_t slab) {
  std::uint32_t c[4] = {static_cast<std::uint32_t>(source.step),
                        static_cast<std::uint32_t>(source.step >> 32), source.variable, slab};
  std::uint32_t key[2] = {static_cast<std::uint32_t>(source.seed),
                          static_cast<std::uint32_t>(source.seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xd2511f53} * c[0], b = std::uint64_t{0xcd9e8d57} * c[2];
    c[0] = static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ key[0];
    c[1] = static_cast<std::uint32_t>(b);
    c[2] = static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ key[1];
    c[3] = static_cast<std::uint32_t>(a);
    key[0] += 0x9e3779b9;
    key[1] += 0xbb67ae85;
  }
  return stream == RandomStream::kWeights ? RandomKeys{c[0], c[1]} : RandomKeys{c[2], c[3]};
}

// By which the Weyl sequence grows from word to word.
constexpr std::uint32_t kWeylStep = 0x9e3779b9;

// `Bits` is a std::uint32_t or a vector of them; `x` what the Weyl sequence is at the word.
template <class Bits>
ADAMAX_HOST_DEVICE Bits scrambled(Bits x, const RandomKeys& keys) {
  x ^= x >> 17;
  x *= 0xed5ad4bbu;
  x ^= x >> 11;
  x ^= keys.exclusive_or;
  x *= 0xac4c1b51u;
  x ^= x >> 15;
  x *= 0x31848babu;
  x ^= x >> 14;
  return x;
}

template <class Bits>
ADAMAX_HOST_DEVICE Bits random_words(Bits index, const RandomKeys& keys) {
  return scrambled(index * kWeylStep + keys.add, keys);
}

}  // namespace adamax

// Writes the random numbers of csrc/core/random.hpp without end, for a battery of statistical tests
// that takes minutes and is no part of CI:
//
//   g++ -std=c++20 -O2 -Icsrc tests/cpp/random_stream.cpp -o random_stream
//   ./random_stream ORDER | RNG_test stdin32 -tlmin 64MB -tlmax 1GB    (PractRand 0.95)
//
// ORDER is one of the names below. With "two-rounds" behind it the words come from a hash that is
// not good enough: the control, of which the battery has to fail "elements" and "streams".
//
// A slab is a permutation of 32-bit words: none comes twice. Where more than 1/32 of one is read,
// which is 512 MiB of "elements", a battery begins to see that words are spread too evenly, as it
// does with any other permutation; "tensors" is the same order without that.
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "core/random.hpp"

namespace {

using adamax::RandomKeys;
using adamax::RandomStream;

struct Place {
  std::uint64_t word = 0, step = 1;
  std::uint32_t variable = 0;
  RandomStream stream = RandomStream::kWeights;
};

// What comes n-th.
using Order = Place (*)(std::uint64_t n);
const std::map<std::string, Order> kOrders = {
    {"elements", [](std::uint64_t n) { return Place{.word = n}; }},
    {"tensors",  // element after element, of variables of 2^24 words
     [](std::uint64_t n) {
       return Place{.word = n % (1 << 24), .variable = static_cast<std::uint32_t>(n >> 24)};
     }},
    {"variables",  // the same, of 16 words
     [](std::uint64_t n) {
       return Place{.word = n % 16, .variable = static_cast<std::uint32_t>(n / 16)};
     }},
    {"steps",  // 4096 of a word, then of the next
     [](std::uint64_t n) { return Place{.word = n / 4096, .step = 1 + n % 4096}; }},
    {"element",  // one for ever
     [](std::uint64_t n) { return Place{.step = 1 + n}; }},
    {"streams",  // both side by side
     [](std::uint64_t n) {
       return Place{.word = n / 2, .stream = static_cast<RandomStream>(n % 2)};
     }},
};

using Hash = std::uint32_t (*)(std::uint32_t, const RandomKeys&);

std::uint32_t hash_in_use(std::uint32_t index, const RandomKeys& keys) {
  return adamax::random_words(index, keys);
}

// lowbias32 of the hash-prospector, keyed by exclusive or.
std::uint32_t two_rounds(std::uint32_t index, const RandomKeys& keys) {
  std::uint32_t x = index ^ keys.add;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x ^ keys.exclusive_or;
}

}  // namespace

int main(int count, char** arguments) {
  const auto order = count > 1 ? kOrders.find(arguments[1]) : kOrders.end();
  const bool is_control = count > 2 && arguments[2] == std::string("two-rounds");
  if (order == kOrders.end() || count > 2 + is_control) {
    std::fprintf(stderr, "expected an order, and perhaps two-rounds; orders are:");
    for (const auto& [name, _] : kOrders) std::fprintf(stderr, " %s", name.c_str());
    std::fprintf(stderr, "\n");
    return 1;
  }
  const Hash hash = is_control ? two_rounds : hash_in_use;
  std::vector<std::uint32_t> words(1 << 14);
  for (std::uint64_t n = 0;;) {
    for (std::uint32_t& word : words) {
      const Place place = order->second(n++);
      const RandomKeys keys =
          adamax::random_keys({/*seed=*/0, place.step, place.variable}, place.stream,
                              static_cast<std::uint32_t>(place.word >> 32));
      word = hash(static_cast<std::uint32_t>(place.word), keys);
    }
    if (std::fwrite(words.data(), sizeof(words[0]), words.size(), stdout) != words.size()) return 0;
  }
}

// Steps on arrays that end or begin where a page lies that nobody may touch, with sentinels on the
// other side: every storage, operation and length. What a kernel touches beyond is a crash here, or
// is told. Prints how many calls there were.
//
// Arguments: the instruction sets, or none for all that run here.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "adamax/adamax.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/parallel.hpp"

namespace {

using namespace adamax;

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(1);
}

constexpr unsigned char kSentinel = 0xa5;

// Memory for an array, between two pages that cannot be touched.
class Guarded {
 public:
  explicit Guarded(std::size_t most) : page_(sysconf(_SC_PAGESIZE)) {
    inner_ = (most + page_ - 1) / page_ * page_;
    void* const all =
        mmap(nullptr, inner_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) fail("no memory");
    begin_ = static_cast<unsigned char*>(all) + page_;
    if (mprotect(begin_, inner_, PROT_READ | PROT_WRITE) != 0) fail("mprotect failed");
  }
  Guarded(const Guarded&) = delete;

  // `bytes` at the begin or at the end, filled with `pattern`; the rest is sentinels.
  void* place(std::size_t bytes, bool at_end, unsigned pattern) {
    std::memset(begin_, kSentinel, inner_);
    array_ = at_end ? begin_ + inner_ - bytes : begin_;
    bytes_ = bytes;
    for (std::size_t i = 0; i < bytes; ++i) {
      pattern = pattern * 1664525u + 1013904223u;
      array_[i] = static_cast<unsigned char>(pattern >> 24);
    }
    return array_;
  }
  void* array() const { return array_; }
  std::size_t bytes() const { return bytes_; }

  void require_sentinels(const char* name) const {
    for (const unsigned char* p = begin_; p < begin_ + inner_; ++p) {
      if (p == array_) p += bytes_;
      if (p < begin_ + inner_ && *p != kSentinel)
        fail(std::string(name) + ": written beside the array");
    }
  }

 private:
  std::size_t page_, inner_, bytes_ = 0;
  unsigned char *begin_, *array_ = nullptr;
};

// The arrays of a variable, in the order of Arrays.
constexpr int kKinds = 8;
constexpr const char* kNames[kKinds] = {"param",   "grad",        "momentum",   "norm",
                                        "average", "accumulator", "norm_scale", "remainder"};

struct Case {
  Storage storage;
  std::int64_t size;
  bool has_grad, has_average, has_accumulator;
};

std::size_t bytes_of(int kind, const Case& c) {
  const std::size_t full = itemsize(compute_dtype(c.storage.param));
  const std::size_t state = c.storage.state == StateFormat::kFull     ? full
                            : c.storage.state == StateFormat::k16Bits ? 2
                                                                      : 1;
  const auto size = static_cast<std::size_t>(c.size);
  switch (kind) {
    case 0:
      return size * itemsize(c.storage.param);
    case 1:
      return c.has_grad ? size * itemsize(c.storage.grad) : 0;
    case 2:
    case 3:
      return size * state;
    case 4:
      return c.has_average ? size * full : 0;
    case 5:
      return c.has_accumulator ? size * full : 0;
    case 6:
      return number_of_scales(c.size, c.storage.state) * sizeof(float);
    default:
      return c.storage.rounding == WeightRounding::kRemainder ? size * 2 : 0;
  }
}

class Runner {
 public:
  explicit Runner(std::int64_t most) {
    for (int kind = 0; kind < kKinds; ++kind) {
      memory_.push_back(std::make_unique<Guarded>(static_cast<std::size_t>(most) * sizeof(double)));
    }
  }

  void run(const Case& c, const Group& group, const Call& call, bool at_end, unsigned seed) {
    std::vector<std::vector<unsigned char>> before(kKinds);
    void* p[kKinds];
    for (int kind = 0; kind < kKinds; ++kind) {
      const std::size_t bytes = bytes_of(kind, c);
      // Neighbours at opposite ends meet the guards at both in one call.
      void* const array = memory_[kind]->place(bytes, at_end != (kind % 2 == 1), seed + kind);
      p[kind] = bytes == 0 && kind >= 1 ? nullptr : array;
    }
    if (p[6] != nullptr) {  // scales are finite and not negative
      for (std::size_t i = 0; i < memory_[6]->bytes() / sizeof(float); ++i) {
        static_cast<float*>(p[6])[i] = c.storage.state == StateFormat::k16Bits ? 1.0f : 0.5f * i;
      }
    }
    const auto* const grad = static_cast<const unsigned char*>(p[1]);
    if (grad != nullptr) before[1].assign(grad, grad + memory_[1]->bytes());
    Variable v{
        {p[0], p[1], p[2], p[3], p[4], p[5], static_cast<float*>(p[6]), p[7]}, c.size, c.storage};
    if (c.size == 0) v.memory.momentum = v.memory.norm = p[0];
    v.has_accumulated = true;
    step({&v, 1}, group, call);
    ++calls;
    for (int kind = 0; kind < kKinds; ++kind) memory_[kind]->require_sentinels(kNames[kind]);
    if (grad != nullptr && std::memcmp(grad, before[1].data(), before[1].size()) != 0) {
      fail("the gradient was written");
    }
  }

  long calls = 0;

 private:
  std::vector<std::unique_ptr<Guarded>> memory_;
};

// The calls of one storage and length.
void run_all(Runner& runner, const Storage& storage, std::int64_t size) {
  unsigned seed = static_cast<unsigned>(size) * 31u;
  const auto run = [&](const Case& c, const Group& group, const Call& call) {
    for (const bool at_end : {false, true}) runner.run(c, group, call, at_end, seed++);
  };
  Group plain;
  plain.learning_rate = 0.01, plain.step = 3, plain.seed = 7;
  Group l2 = plain;
  l2.weight_decay = 0.1, l2.decay = DecayRule::kL2, l2.epsilon_rule = EpsilonRule::kInside;
  Group decoupled = plain;
  decoupled.weight_decay = 0.1, decoupled.clipvalue = 0.5, decoupled.maximize = true;
  const Call clipped{.grad_scale = 0.5, .clip = {ClipRule::kGlobalNorm, 1.0}};
  const Call averaged{.clip = {ClipRule::kNorm, 1.0}, .overwrite = true};
  run({storage, size, true, false, false}, plain, {});
  run({storage, size, true, false, false}, decoupled, {.grad_scale = 0.5});
  run({storage, size, true, false, false}, l2, clipped);
  run({storage, size, true, true, false}, plain, averaged);
  run({storage, size, true, false, true}, plain, {.micro_batches = 2});
  run({storage, size, true, true, true}, l2, {.clip = {ClipRule::kNorm, 1.0}, .micro_batches = 2});
  run({storage, size, false, true, false}, plain, {});
  if (storage.grad == compute_dtype(storage.param)) {
    run({storage, size, false, true, true}, plain, {.micro_batches = 2});
  }
  run({storage, size, true, false, true}, plain, {.micro_batches = 2, .phase = Phase::kAccumulate});
  run({storage, size, true, true, false}, plain, {.phase = Phase::kFinalize, .overwrite = true});
  run({storage, size, true, false, false}, plain, {.require_finite = true});
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> isas(arguments + 1, arguments + count);
  if (isas.empty()) isas = available_isas();
  std::vector<std::int64_t> sizes;
  for (std::int64_t size = 0; size <= 300; ++size) sizes.push_back(size);
  for (const std::int64_t size : {511, 512, 513, 1000, 4095, 4096, 4097, 70'001})
    sizes.push_back(size);
  Runner runner(70'001);
  for (const std::string& isa : isas) {
    cpu::use_isa(isa);
    const long before = runner.calls;
    for (int index = 0; index < kNumStorages; ++index) {
      const Storage storage = storage_at(index);
      if (!exists(storage)) continue;
      for (const std::int64_t size : sizes) run_all(runner, storage, size);
    }
    std::printf("%s: %ld calls, none touched more than its arrays\n", isa.c_str(),
                runner.calls - before);
  }
  return 0;
}

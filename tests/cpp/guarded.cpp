// Every operation on every storage and length, on arrays that begin or end where a page lies that
// nobody may touch, with sentinels on their other side. What is touched beyond an array is a crash
// or is told. The last line says how many calls there were.
//
// Arguments: which part of the lengths is tried, 1 for all of them, 10 for each tenth; then
// instruction sets and "cuda", whose kernels run on the host (emulated_cuda.cpp), or none for all
// that run here.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.hpp"
#include "cpu/parallel.hpp"
#include "cpu/run.hpp"
#include "cuda/backend.hpp"

extern "C" void emulated_clear_log();

namespace {

using namespace adamax;

constexpr std::int64_t kMost = 150'000;  // elements
constexpr std::size_t kBeside = 256;     // bytes that are looked at on either side
constexpr unsigned char kSentinel = 0xa5;

char where[160] = "";  // for messages

[[noreturn]] void fail(const char* name, const char* why) {
  std::fprintf(stderr, "%s: %s: %s\n", where, name, why);
  std::_Exit(1);
}
void report_signal(int) { fail("a page that nobody may touch", "touched"); }

// Deterministic, from 0 to n - 1.
class Draws {
 public:
  explicit Draws(std::uint64_t seed) : state_(seed) {}
  std::size_t operator()(std::size_t n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::size_t>((state_ >> 33) % n);
  }

 private:
  std::uint64_t state_;
};

// Bytes to fill arrays with: of anything, or of numbers that are finite in every type.
const std::vector<unsigned char>& bytes_of(bool is_finite) {
  static const auto make = [](unsigned mask) {
    std::vector<unsigned char> bytes(kMost * sizeof(double) + 4096);
    Draws draw(mask);
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(draw(256) & mask);
    return bytes;
  };
  static const std::vector<unsigned char> any = make(0xff), finite = make(0xbf);
  return is_finite ? finite : any;
}

enum Place { kAtBegin, kAtEnd, kAtOddByte };

// An array between two pages that cannot be touched.
class Guarded {
 public:
  Guarded() {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    inner_ = (kMost * sizeof(double) + page - 1) / page * page;
    void* const all =
        mmap(nullptr, inner_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) fail("mmap", "no memory");
    begin_ = static_cast<unsigned char*>(all) + page;
    if (mprotect(begin_, inner_, PROT_READ | PROT_WRITE) != 0) fail("mprotect", "failed");
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(begin_ - sysconf(_SC_PAGESIZE), inner_ + 2 * sysconf(_SC_PAGESIZE)); }

  unsigned char* place(std::size_t bytes, Place place, const unsigned char* content,
                       std::size_t alignment = 1) {
    bytes_ = bytes;
    array_ = place == kAtBegin ? begin_
             : place == kAtEnd ? begin_ + (inner_ - bytes) / alignment * alignment
                               : begin_ + 1 + (bytes + content[0]) % 64;
    for_each_beside([](unsigned char& byte) { byte = kSentinel; });
    std::memcpy(array_, content, bytes);
    return array_;
  }
  void require_sentinels(const char* name) const {
    for_each_beside([&](unsigned char& byte) {
      if (byte != kSentinel) fail(name, "written beside the array");
    });
  }

 private:
  template <class Function>
  void for_each_beside(const Function& function) const {
    unsigned char* const end = array_ + bytes_;
    const auto before = std::min<std::size_t>(kBeside, array_ - begin_);
    const auto behind = std::min<std::size_t>(kBeside, begin_ + inner_ - end);
    std::for_each(array_ - before, array_, function);
    std::for_each(end, end + behind, function);
  }

  std::size_t inner_, bytes_ = 0;
  unsigned char *begin_, *array_ = nullptr;
};

struct Case {
  Storage storage;
  std::int64_t size;
  bool has_grad, has_average, has_accumulator;
};

// The arrays of a variable, in the order of Arrays.
constexpr int kKinds = 8, kGrad = 1, kScale = 6;
constexpr const char* kNames[kKinds] = {"param",   "grad",        "momentum",   "norm",
                                        "average", "accumulator", "norm_scale", "remainder"};

std::size_t bytes_of(int kind, const Case& c) {
  const std::size_t full = itemsize(compute_dtype(c.storage.param));
  const bool is_full = c.storage.state == StateFormat::kFull;
  const std::size_t state = is_full ? full : c.storage.state == StateFormat::k16Bits ? 2 : 1;
  const std::size_t scales = is_full ? 0 : number_of_scales(c.size, c.storage.state);
  const std::size_t itemsizes[kKinds] = {itemsize(c.storage.param),
                                         c.has_grad ? itemsize(c.storage.grad) : 0,
                                         state,
                                         state,
                                         c.has_average ? full : 0,
                                         c.has_accumulator ? full : 0,
                                         0,
                                         c.storage.rounding == WeightRounding::kRemainder ? 2u : 0};
  return kind == kScale ? scales * sizeof(float) : c.size * itemsizes[kind];
}

// Does calls on arrays of its own.
class Runner {
 public:
  explicit Runner(const Backend& backend) : backend_(backend) {}

  void run(const std::vector<Case>& cases, const Group& group, const Call& call, Place place,
           bool is_finite) {
    require_arrays(cases.size());
    const unsigned char* const content = bytes_of(is_finite).data() + calls++ % 4096;
    std::vector<Variable> variables;
    for (std::size_t i = 0; i < cases.size(); ++i) {
      Variable v{place_arrays(i, cases[i], place, content), cases[i].size, cases[i].storage};
      v.has_accumulated = true;
      v.number = static_cast<std::uint32_t>(i);
      v.first_element = calls % 3 * ((std::int64_t{1} << 33) - kStateBlock);
      variables.push_back(v);
    }
    const Program program = make_program(variables, {&group, 1}, call);
    const std::size_t bytes = backend_.scratch_bytes(program);
    constexpr std::size_t kAlignment = 16;
    void* const scratch =
        scratch_.place(bytes, calls % 2 == 0 ? kAtBegin : kAtEnd, content, kAlignment);
    const int device = &backend_ == &cpu::backend() ? kHost : 0;
    const Outcome outcome =
        backend_.run({device, 1}, {bytes > 0 ? scratch : nullptr, bytes}, program);
    if (is_finite && !outcome.is_finite) fail("gradients", "not taken for finite");
    scratch_.require_sentinels("scratch");
    for (std::size_t i = 0; i < cases.size(); ++i) {
      require_sentinels(i);
      const void* const grad = variables[i].memory.grad;
      if (grad != nullptr && std::memcmp(grad, content, bytes_of(kGrad, cases[i])) != 0) {
        fail("grad", "written");
      }
    }
    if (device != kHost) emulated_clear_log();
  }

  // What no backend runs: the norm of all, state and weights as float32 and back.
  void run_others(const Case& c, Place place) {
    require_arrays(1);
    const Arrays memory = place_arrays(0, c, place, bytes_of(true).data());
    auto* const first = static_cast<float*>(memory.average);
    auto* const second = static_cast<float*>(memory.accumulator);
    const ConstBuffer buffers[] = {{c.storage.param, c.size, memory.param},
                                   {c.storage.grad, c.size, memory.grad}};
    if (!std::isfinite(global_norm(buffers))) fail("global norm", "not finite");
    if (c.storage.param != DType::kFloat64) {
      decode_state(c.storage.state, memory, c.size, 1e-7, first, second);
      encode_state(c.storage.state, memory, c.size, 1e-7, first, second);
    }
    if (memory.remainder != nullptr) {
      auto* const weights = static_cast<BFloat16*>(memory.param);
      auto* const remainders = static_cast<std::int16_t*>(memory.remainder);
      join_weights(weights, remainders, c.size, first);
      split_weights(first, c.size, weights, remainders);
    }
    require_sentinels(0);
    ++calls;
  }

  long calls = 0;

 private:
  void require_arrays(std::size_t count) {
    if (arrays_.size() < count) arrays_ = std::vector<std::array<Guarded, kKinds>>(count);
  }
  Arrays place_arrays(std::size_t i, const Case& c, Place place, const unsigned char* content) {
    void* p[kKinds];
    for (int kind = 0; kind < kKinds; ++kind) {
      const std::size_t bytes = bytes_of(kind, c);
      // Neighbours at opposite ends meet the guards at both in one call.
      const Place other = place == kAtBegin ? kAtEnd : place == kAtEnd ? kAtBegin : kAtOddByte;
      p[kind] = arrays_[i][kind].place(bytes, kind % 2 == 0 ? place : other, content);
      if (kind == kScale) {  // which is finite and not negative
        for (std::size_t k = 0; k < bytes; ++k) static_cast<unsigned char*>(p[kind])[k] &= 0x3f;
      }
      if (bytes == 0 && kind != 0) p[kind] = nullptr;
    }
    return {p[0], p[1], p[2], p[3], p[4], p[5], static_cast<float*>(p[kScale]), p[7]};
  }
  void require_sentinels(std::size_t i) const {
    for (int kind = 0; kind < kKinds; ++kind) arrays_[i][kind].require_sentinels(kNames[kind]);
  }

  const Backend& backend_;
  std::vector<std::array<Guarded, kKinds>> arrays_;
  Guarded scratch_;
};

// A call for every loop: the arrays that there are, and both rules; all else is drawn.
void run_all(Runner& runner, const Storage& storage, const std::vector<std::int64_t>& sizes) {
  Draws draw(static_cast<std::uint64_t>(sizes[0]) + 1);
  for (int loop = 0; loop < 2 * 2 * 2 * 3 * 2 * 3; ++loop) {
    const bool has_grad = loop % 2 == 0, has_average = loop / 2 % 2 == 1;
    const bool has_accumulator = loop / 4 % 2 == 1;
    Group group;
    group.decay = static_cast<DecayRule>(loop / 8 % 3);
    group.weight_decay = group.decay == DecayRule::kNone ? 0.0 : 0.1;
    group.epsilon_rule = static_cast<EpsilonRule>(loop / 24 % 2);
    const auto place = static_cast<Place>(loop / 48);
    if (loop % 48 == 0) runner.run_others({storage, sizes.back(), true, true, true}, place);
    group.learning_rate = 0.01, group.seed = 7, group.step = 1 + draw(5);
    group.ema_momentum = draw(3) == 0 ? 1.0 : 0.9;
    group.maximize = draw(2) == 0;
    Call call;
    call.grad_scale = draw(2) == 0 ? 1.0 : 0.5;
    call.clip = {static_cast<ClipRule>(draw(3)), 1.0};
    if (call.clip.rule == ClipRule::kNone && draw(2) == 0) group.clipvalue = 0.5;
    call.micro_batches = has_accumulator ? 2 : 1;
    call.overwrite = has_average && draw(2) == 0;
    call.require_finite = draw(3) == 0;
    std::vector<Case> cases;
    for (const std::int64_t size : sizes) {
      cases.push_back({storage, size, has_grad, has_average, has_accumulator});
    }
    const bool is_finite = draw(2) == 0;
    runner.run(cases, group, call, place, is_finite);
    if (has_accumulator && loop / 8 % 6 == 0) {
      call.phase = Phase::kAccumulate, call.overwrite = false;
      runner.run(cases, group, call, place, is_finite);
    }
    if (has_average && loop / 8 % 6 == 0) {
      call.phase = Phase::kFinalize, call.overwrite = true;
      runner.run(cases, group, call, place, is_finite);
    }
  }
}

// All lengths of a few vectors, with their tails, and those around tiles, blocks and chunks.
std::vector<std::int64_t> lengths(int part) {
  std::vector<std::int64_t> all, some;
  for (std::int64_t n = 0; n <= 140; ++n) all.push_back(n);
  for (const std::int64_t edge : {256, 512, 4096, 8192}) {
    for (const std::int64_t beside : {-17, -1, 0, 1, 15}) all.push_back(edge + beside);
  }
  for (std::size_t i = 1; i < all.size(); i += part) some.push_back(all[i]);
  return some;
}

template <class Function>
void for_each_storage(const std::string& name, const char* what, const Function& function) {
  for (int index = 0; index < kNumStorages; ++index) {
    const Storage storage = storage_at(index);
    if (!exists(storage)) continue;
    std::snprintf(where, sizeof(where), "%s, %s of %s weights, %s gradients, state %d, rounding %d",
                  name.c_str(), what, dtype_name(storage.param).data(),
                  dtype_name(storage.grad).data(), static_cast<int>(storage.state),
                  static_cast<int>(storage.rounding));
    function(storage);
  }
}

long run_backend(const std::string& name, int part) {
  const bool is_cuda = name == "cuda";
  if (!is_cuda) cpu::use_isa(name);
  const Backend& backend = is_cuda ? cuda::backend() : cpu::backend();
  Runner runner(backend);
  for (const std::int64_t size : lengths(part)) {
    const std::string what = std::to_string(size) + " elements";
    for_each_storage(name, what.c_str(), [&](const Storage& s) { run_all(runner, s, {size}); });
  }
  for_each_storage(name, "several variables",
                   [&](const Storage& s) { run_all(runner, s, {33, 0, 1, 300, 4097}); });
  if (is_cuda) return runner.calls;

  // Several threads, whose cuts are odd, for several callers at once.
  long calls = runner.calls;
  int number = 0;
  for_each_storage(name, "several threads", [&](const Storage& storage) {
    if (number++ % part != 0) return;
    const auto call = [&](int seed) {
      Runner own(backend);
      const Case large{storage, 70'001 + seed, true, true, true},
          small{storage, 5, true, true, true};
      const Case larger{storage, 131'075, true, true, true};
      for (const ClipRule clip : {ClipRule::kNone, ClipRule::kNorm, ClipRule::kGlobalNorm}) {
        const Call with{.clip = {clip, 1.0}, .micro_batches = 2, .require_finite = true};
        own.run({large, small, larger}, {}, with, static_cast<Place>(seed), true);
      }
      return own.calls;
    };
    long of_other = 0;
    std::thread other([&] { of_other = call(1); });
    calls += call(2);
    other.join();
    calls += of_other;
  });
  return calls;
}

}  // namespace

int main(int count, char** arguments) {
  for (const int signal : {SIGSEGV, SIGBUS}) std::signal(signal, report_signal);
  const int part = count > 1 ? std::atoi(arguments[1]) : 1;
  std::vector<std::string> names(arguments + std::min(count, 2), arguments + count);
  if (names.empty()) {
    names = available_isas();
    names.push_back("cuda");
  }
  cpu::override_cpu_limit(3);  // so that threads can be more than processors
  long all = 0;
  for (const std::string& name : names) {
    const long calls = run_backend(name, part);
    std::printf("%s: %ld\n", name.c_str(), calls);
    all += calls;
  }
  std::printf("%ld calls on guarded memory\n", all);
  return 0;
}

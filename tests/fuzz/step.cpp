// Fuzzes the public C++ API: any variables, groups and calls over memory that ends where it ends.
//
// A call is refused with std::invalid_argument and has written nothing, or it writes what its
// operation writes. Whatever it reads or writes beyond an array, AddressSanitizer sees.
#include <fuzzer/FuzzedDataProvider.h>
#include <adamax/adamax.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

using namespace adamax;

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "finding: %s\n", what.c_str());
  std::abort();
}
void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// Exactly so many bytes on the heap, and what they were.
struct Block {
  std::unique_ptr<unsigned char[]> memory;
  std::vector<unsigned char> before;

  bool has_changed() const { return !std::equal(before.begin(), before.end(), memory.get()); }
};

class Fuzzed {
 public:
  Fuzzed(const std::uint8_t* data, std::size_t size) : input_(data, size) {}

  void run();

 private:
  // Mostly what is right, so that most of a call is.
  bool rarely() { return input_.ConsumeIntegral<std::uint8_t>() > 250; }
  template <class T>
  T usually(T usual, T most) {
    return rarely() ? static_cast<T>(input_.ConsumeIntegralInRange<int>(0, static_cast<int>(most)))
                    : usual;
  }
  template <class T>
  T any_of_three() {
    return static_cast<T>(input_.ConsumeIntegralInRange(0, 2));
  }
  double number(double usual) {
    constexpr double kSpecial[] = {0.0,  -0.0,  1.0,    -1.0,    0.5,      2.0,     1e-46,
                                   1e39, 1e308, 5e-324, 0x1p-86, 0x1p-149, 0x1p127, 1.0 - 0x1p-53};
    switch (input_.ConsumeIntegralInRange(0, 15)) {
      case 0:
        return input_.PickValueInArray(kSpecial);
      case 1: {
        const auto bits = input_.ConsumeIntegral<std::uint64_t>();
        double value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
      }
      case 2:
        return input_.ConsumeProbability<double>();
      default:
        return usual;
    }
  }
  std::int64_t count(std::int64_t usual) {
    return rarely() ? input_.ConsumeIntegral<std::int64_t>() : usual;
  }

  // Starts at any byte: every alignment is accepted.
  template <class T>
  T* array(std::size_t elements, bool may_lack = true) {
    if (may_lack && rarely()) return nullptr;
    const std::size_t bytes = elements * sizeof(T), offset = input_.ConsumeIntegralInRange(0, 3);
    Block block{std::make_unique<unsigned char[]>(offset + bytes), {}};
    // Short inputs go round.
    const auto pattern = input_.ConsumeBytes<unsigned char>(std::min<std::size_t>(bytes, 16));
    for (std::size_t i = 0; i < bytes && !pattern.empty(); ++i) {
      block.memory[offset + i] = pattern[i % pattern.size()] ^ (i / pattern.size() * 0x1d);
    }
    block.before.assign(block.memory.get(), block.memory.get() + offset + bytes);
    blocks_.push_back(std::move(block));
    return reinterpret_cast<T*>(blocks_.back().memory.get() + offset);
  }
  void* array_of(DType dtype, std::size_t elements) {
    return itemsize(dtype) == 8   ? array<double>(elements)
           : itemsize(dtype) == 4 ? static_cast<void*>(array<float>(elements))
           : itemsize(dtype) == 2 ? static_cast<void*>(array<std::int16_t>(elements))
                                  : array<std::int8_t>(elements);
  }

  Variable variable(std::size_t groups);
  Group group();
  Call call();
  void decode(const Variable& variable);

  bool has_changed() const {
    return std::any_of(blocks_.begin(), blocks_.end(),
                       [](const Block& block) { return block.has_changed(); });
  }

  FuzzedDataProvider input_;
  std::vector<Block> blocks_;
  float device_number_ = 1.0f;
};

Variable Fuzzed::variable(std::size_t groups) {
  constexpr std::int64_t kSizes[] = {0, 1, 3, 16, 17, 255, 256, 257, 300, 515};
  Variable v{};
  v.size = input_.PickValueInArray(kSizes);
  v.storage = storage_at(input_.ConsumeIntegralInRange(0, kNumStorages - 1));
  v.storage.param = usually(v.storage.param, DType::kUInt16);
  v.storage.grad = usually(v.storage.grad, DType::kUInt16);
  const DType computed = compute_dtype(v.storage.param);
  const bool is_full = v.storage.state == StateFormat::kFull;
  const bool is_16 = v.storage.state == StateFormat::k16Bits;
  const DType of_state = is_full ? computed : is_16 ? DType::kBFloat16 : DType::kInt8;
  Arrays& memory = v.memory;
  memory.param = array_of(v.storage.param, v.size);
  if (input_.ConsumeIntegralInRange(0, 7) != 0) memory.grad = array_of(v.storage.grad, v.size);
  memory.momentum = array_of(of_state, v.size);
  memory.norm = array_of(of_state, v.size);
  if (input_.ConsumeBool()) memory.average = array_of(computed, v.size);
  if (input_.ConsumeBool()) memory.accumulator = array_of(computed, v.size);
  if (!is_full || rarely()) {
    memory.norm_scale = array<float>(number_of_scales(v.size, v.storage.state));
  }
  if (v.storage.rounding == WeightRounding::kRemainder || rarely()) {
    memory.remainder = array<std::int16_t>(v.size);
  }
  if (rarely()) v.size = -1 - v.size;
  v.group = usually<std::uint32_t>(groups - 1, 3);
  v.has_accumulated = input_.ConsumeBool();
  v.number = input_.ConsumeIntegral<std::uint32_t>();
  v.first_element = count(kStateBlock * input_.ConsumeIntegral<std::uint16_t>());
  return v;
}

Group Fuzzed::group() {
  Group g;
  g.learning_rate = number(0.01);
  g.beta_1 = number(0.9);
  g.beta_2 = number(0.999);
  g.epsilon = number(1e-7);
  g.weight_decay = number(0.0);
  g.decay = any_of_three<DecayRule>();
  g.epsilon_rule = input_.ConsumeBool() ? EpsilonRule::kInside : EpsilonRule::kOutside;
  if (rarely()) g.clipvalue = number(0.5);
  g.ema_momentum = number(0.99);
  g.step = count(1 + input_.ConsumeIntegral<std::uint8_t>());
  g.maximize = input_.ConsumeBool();
  g.seed = input_.ConsumeIntegral<std::uint64_t>();
  if (rarely()) g.device.learning_rate = &device_number_;
  return g;
}

Call Fuzzed::call() {
  Call c;
  c.grad_scale = number(1.0);
  c.clip = {any_of_three<ClipRule>(), number(1.0)};
  c.micro_batches = count(1 + input_.ConsumeIntegralInRange(0, 2));
  c.phase = any_of_three<Phase>();
  c.overwrite = input_.ConsumeIntegralInRange(0, 7) == 0;
  c.require_finite = input_.ConsumeBool();
  if (rarely()) c.device.scale = &device_number_;
  if (rarely()) c.device.writes_gradients = true;
  return c;
}

// The state as it is now, whatever its codes are; it stays as it is.
void Fuzzed::decode(const Variable& v) {
  const bool lacks = v.memory.momentum == nullptr || v.memory.norm == nullptr ||
                     (v.memory.norm_scale == nullptr && v.storage.state != StateFormat::kFull);
  if (v.size < 0 || lacks || compute_dtype(v.storage.param) != DType::kFloat32) return;
  const auto size = static_cast<std::size_t>(v.size);
  auto momentum = std::make_unique<float[]>(size), norm = std::make_unique<float[]>(size);
  decode_state(v.storage.state, v.memory, v.size, 1e-7, momentum.get(), norm.get());
  encode_state(v.storage.state, v.memory, v.size, 1e-7, momentum.get(), norm.get());
}

void Fuzzed::run() {
  std::vector<Group> groups(1 + input_.ConsumeIntegralInRange(0, 1));
  for (Group& g : groups) g = group();
  std::vector<Variable> variables(input_.ConsumeIntegralInRange(0, 3));
  for (Variable& v : variables) v = variable(groups.size());
  const Call c = call();
  bool is_done = false;
  try {
    is_done = step(variables, groups, c);
    require(is_done || c.require_finite, "a step that was not asked to look at gradients refused");
  } catch (const std::invalid_argument& error) {
    require(*error.what() != '\0', "an error without words");
  }
  require(is_done || !has_changed(), "a step that was not done wrote");
  for (const Block& block : blocks_) {
    const auto begins_in = [&](const void* array) {
      const auto* const at = static_cast<const unsigned char*>(array);
      return at >= block.memory.get() && at <= block.memory.get() + block.before.size();
    };
    for (const Variable& v : variables) {
      const bool is_gradient = begins_in(v.memory.grad);
      const bool is_state = begins_in(v.memory.momentum) || begins_in(v.memory.norm);
      const bool is_weight = begins_in(v.memory.param);
      if (is_gradient || (is_state && c.phase != Phase::kUpdate) ||
          (is_weight && c.phase == Phase::kAccumulate)) {
        require(!block.has_changed(), "an array was written that the call only reads");
      }
    }
  }
  std::vector<ConstBuffer> buffers;
  for (const Variable& v : variables) {
    const bool has_scales = v.storage.state == StateFormat::k8Bits;
    if (v.size >= 0 || v.memory.grad == nullptr || !has_scales) {
      buffers.push_back({v.storage.grad, v.size, v.memory.grad});
    }
  }
  try {
    require(!(global_norm(buffers) < 0), "a norm below zero");
  } catch (const std::invalid_argument&) {
  }
  for (const Variable& v : variables) decode(v);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Fuzzed(data, size).run();
  return 0;
}

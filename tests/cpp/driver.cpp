// Does the calls that it reads from its standard input, and writes what they leave: a test can run
// it on any processor (tests/support/processors.py).
//
// All numbers of a call are doubles, so that both sides need no layout. An argument is the
// floating-point control register to do the calls under, in hexadecimal.
#include <adamax/adamax.hpp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

namespace adamax::cpu {
void override_cpu_limit(int cpus);  // as csrc/cpu/parallel.hpp has it
}

namespace {

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(1);
}

void set_control_register([[maybe_unused]] std::uint64_t value) {
#if defined(__x86_64__)
  const auto half = static_cast<std::uint32_t>(value);
  asm volatile("ldmxcsr %0" : : "m"(half));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(value));
#endif
}

std::uint64_t control_register() {
  std::uint64_t value = 0;
#if defined(__x86_64__)
  std::uint32_t half;
  asm volatile("stmxcsr %0" : "=m"(half));
  value = half & ~0x3fu;  // without the flags of what happened
#elif defined(__aarch64__)
  asm volatile("mrs %0, fpcr" : "=r"(value));
#endif
  return value;
}

// False at the end of the input.
bool read(void* to, std::size_t bytes) {
  const std::size_t got = std::fread(to, 1, bytes, stdin);
  if (got != bytes && got != 0) fail("the input ends within a call");
  return got == bytes;
}

double number() {
  double value;
  if (!read(&value, sizeof(value))) fail("the input ends within a call");
  return value;
}

template <class Integer = std::int64_t>
Integer integer() {
  return static_cast<Integer>(static_cast<std::int64_t>(number()));
}

void write(const void* from, std::size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

// An array at an address that is `offset` bytes past a multiple of kAlignment, between bytes that
// nothing may write.
class Array {
 public:
  Array(std::size_t bytes, std::size_t offset)
      : bytes_(bytes), memory_(2 * kGuard + kAlignment + offset + bytes, kUntouched) {
    const auto start = reinterpret_cast<std::uintptr_t>(memory_.data()) + kGuard;
    data_ = reinterpret_cast<unsigned char*>((start + kAlignment - 1) / kAlignment * kAlignment +
                                             offset);
    if (bytes != 0 && !read(data_, bytes)) fail("the input ends within a call");
  }

  unsigned char* data() { return data_; }
  std::size_t bytes() const { return bytes_; }

  void check_surroundings() const {
    for (const unsigned char& byte : memory_) {
      if ((&byte < data_ || &byte >= data_ + bytes_) && byte != kUntouched) {
        fail("memory around an array was written");
      }
    }
  }

 private:
  static constexpr std::size_t kAlignment = 64, kGuard = 64;
  static constexpr unsigned char kUntouched = 0xa5;
  std::size_t bytes_;
  std::vector<unsigned char> memory_;
  unsigned char* data_;
};

adamax::Group read_group() {
  adamax::Group group;
  group.learning_rate = number();
  group.beta_1 = number();
  group.beta_2 = number();
  group.epsilon = number();
  group.weight_decay = number();
  group.decay = integer<adamax::DecayRule>();
  group.epsilon_rule = integer<adamax::EpsilonRule>();
  if (const double limit = number(); limit != 0) group.clipvalue = limit;
  group.ema_momentum = number();
  group.step = integer();
  group.seed = integer<std::uint64_t>();  // in two halves, which doubles hold
  group.seed |= integer<std::uint64_t>() << 32;
  return group;
}

adamax::Call read_call() {
  adamax::Call call;
  call.grad_scale = number();
  call.clip.rule = integer<adamax::ClipRule>();
  call.clip.limit = number();
  call.micro_batches = integer();
  call.phase = integer<adamax::Phase>();
  call.overwrite = number() != 0;
  call.require_finite = number() != 0;
  adamax::set_num_threads(integer<int>());
  return call;
}

void do_call(std::size_t num_variables) {
  const adamax::Group group = read_group();
  const adamax::Call call = read_call();
  std::vector<std::vector<Array>> arrays(num_variables);
  std::vector<adamax::Variable> variables;
  std::vector<adamax::ConstBuffer> gradients;
  for (auto& present : arrays) {
    adamax::Variable variable{};
    variable.storage = adamax::storage_at(integer<int>());
    variable.size = integer();
    variable.has_accumulated = number() != 0;
    variable.number = integer<std::uint32_t>();
    variable.first_element = integer();
    const auto offset = integer<std::size_t>();
    const auto read_array = [&](adamax::DType dtype, std::int64_t size) -> void* {
      if (number() == 0) return nullptr;
      present.emplace_back(size * adamax::itemsize(dtype), offset);
      return present.back().data();
    };
    const auto [param, grad, state, rounding] = variable.storage;
    const adamax::DType computed = adamax::compute_dtype(param);
    const bool is_16 = state == adamax::StateFormat::k16Bits;
    const bool is_8 = state == adamax::StateFormat::k8Bits;
    const std::int64_t size = variable.size;
    adamax::Arrays& memory = variable.memory;
    using adamax::DType;
    memory.param = read_array(param, size);
    memory.grad = read_array(grad, size);
    memory.momentum = read_array(is_16 ? DType::kUInt16 : is_8 ? DType::kInt8 : computed, size);
    memory.norm = read_array(is_16 ? DType::kUInt16 : is_8 ? DType::kUInt8 : computed, size);
    memory.average = read_array(computed, size);
    memory.accumulator = read_array(computed, size);
    const std::int64_t scales = number_of_scales(size, variable.storage.state);
    memory.norm_scale = static_cast<float*>(read_array(DType::kFloat32, scales));
    memory.remainder = read_array(DType::kInt16, size);
    if (memory.grad != nullptr) gradients.push_back({grad, size, memory.grad});
    variables.push_back(variable);
  }

  const std::uint64_t mode = control_register();
  const double norm = adamax::global_norm(gradients);
  const double is_finite = adamax::step(variables, group, call);
  if (control_register() != mode) fail("the floating-point mode was not put back");

  write(&norm, sizeof(norm));
  write(&is_finite, sizeof(is_finite));
  for (auto& present : arrays) {
    for (Array& array : present) {
      array.check_surroundings();
      write(array.data(), array.bytes());
    }
  }
}

}  // namespace

int main(int argc, char** argv) try {
#ifdef _WIN32
  for (std::FILE* const file : {stdin, stdout}) _setmode(_fileno(file), _O_BINARY);
#endif
  std::printf("%s\n", adamax::active_isa().c_str());
  std::fflush(stdout);
  adamax::cpu::override_cpu_limit(8);  // so that threads can be more than processors
  if (argc > 1) set_control_register(std::strtoull(argv[1], nullptr, 16));
  for (double num_variables; read(&num_variables, sizeof(num_variables));) {
    do_call(static_cast<std::size_t>(num_variables));
    std::fflush(stdout);
  }
} catch (const std::invalid_argument& error) {
  fail(error.what());
}

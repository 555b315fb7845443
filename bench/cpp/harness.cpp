// The harness: the step and its parts beside the bound of the same loads and stores, in turns.
//
// Google Benchmark names, filters and reports; each benchmark times its own rounds, because the
// step and its bound must see the same machine.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "adamax/adamax.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/parallel.hpp"
#include "memory.hpp"
#include "turns.hpp"

namespace adamax_bench {
namespace {

using adamax::Call;
using adamax::DType;
using adamax::Group;
using adamax::Storage;
using Sizes = std::vector<std::int64_t>;

constexpr DType kF32 = DType::kFloat32;
constexpr Storage kFloats{kF32, kF32};
constexpr Storage kBFloats{DType::kBFloat16, DType::kBFloat16};

struct Setting {
  std::string isa = adamax::active_isa();
  int threads = adamax::get_num_threads();
  void apply() const {
    adamax::cpu::use_isa(isa);
    adamax::set_num_threads(threads);
  }
  std::string name() const { return "/isa:" + isa + "/threads:" + std::to_string(threads); }
};

// The bound gets as many threads as the step uses at that size.
int threads_of_step(const Memory& memory) {
  std::int64_t bytes = 0;
  for (const adamax::Variable& v : memory.variables()) {
    bytes += 4 * v.size * static_cast<std::int64_t>(itemsize(compute_dtype(v.storage.param)));
  }
  return adamax::cpu::threads_for(bytes);
}

void add(const std::string& name, std::function<void(benchmark::State&)> body) {
  benchmark::RegisterBenchmark(name.c_str(), std::move(body))
      ->Iterations(1)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

std::string elements_of(std::int64_t n) { return "/elements:" + std::to_string(n); }

std::string pair_name(const Storage& storage) {
  return "/pair:" + std::string(dtype_name(storage.param)) + "-" +
         std::string(dtype_name(storage.grad));
}

std::string low_name(const Storage& storage) {
  constexpr const char* kBits[] = {"32", "16", "8"};
  constexpr const char* kRoundings[] = {"nearest", "stochastic", "remainder"};
  return std::string("/state:") + kBits[static_cast<int>(storage.state)] +
         "/weights:" + kRoundings[static_cast<int>(storage.rounding)];
}

void add_step(const std::string& name, const Sizes& sizes, const Streams& streams,
              const Group& group, const Setting& setting, const Call& call = {}) {
  add(name, [=](benchmark::State& state) {
    setting.apply();
    const Memory memory(sizes, streams);
    std::vector<std::vector<bound_stream>> passes{memory.step_streams()};
    if (call.clip.rule != adamax::ClipRule::kNone) passes.push_back(memory.norm_streams());
    Group past_first = group;  // on the first step an average is started and not averaged
    past_first.step = 2;
    report(state, memory.elements(), threads_of_step(memory), passes,
           [&] { adamax::step(memory.variables(), past_first, call); });
  });
}

void add_size_benchmarks() {
  const std::set<int> thread_counts{1, Setting{}.threads};
  for (const int threads : thread_counts) {
    const Setting setting{.threads = threads};
    for (int exponent = 10; exponent <= 28; ++exponent) {
      const std::int64_t n = std::int64_t{1} << exponent;
      add_step("size" + setting.name() + elements_of(n), {n}, {}, {}, setting);
    }
  }
}

void add_dtype_benchmarks() {
  const Setting setting;
  for (const auto& [param, grad] : adamax::kPairs) {
    const Storage storage{param, grad};
    for (const bool average : {false, true}) {
      for (const bool accumulator : {false, true}) {
        for (const int exponent : {14, 20, 24}) {
          const std::int64_t n = std::int64_t{1} << exponent;
          const std::string work = std::string("plain") + (average ? "+average" : "") +
                                   (accumulator ? "+accumulator" : "");
          add_step("step" + pair_name(storage) + "/work:" + work + setting.name() + elements_of(n),
                   {n}, {storage, average, accumulator}, {}, setting,
                   {.micro_batches = accumulator ? 4 : 1});
        }
      }
    }
  }
}

// State in fewer bits, and what becomes of bfloat16 weights; the float32 step beside it.
void add_low_memory_benchmarks() {
  const std::set<int> thread_counts{1, Setting{}.threads};
  for (const std::string& isa : adamax::available_isas()) {
    for (const int threads : thread_counts) {
      const Setting setting{isa, threads};
      for (int index = 0; index < adamax::kNumStorages; ++index) {
        const Storage storage = adamax::storage_at(index);
        const bool is_usual = storage.param == storage.grad && storage.param != DType::kFloat16;
        if (!exists(storage) || !is_usual || storage.param == DType::kFloat64) continue;
        // In memory, and the fewest that so many threads share, which their caches hold.
        const std::int64_t few = threads == 1 ? 1 << 14 : threads * (1 << 16);
        for (const std::int64_t n : {few, std::int64_t{1} << 24}) {
          add_step("low" + pair_name(storage) + low_name(storage) + setting.name() + elements_of(n),
                   {n}, {storage}, {}, setting);
        }
      }
    }
  }
}

void add_rule_benchmarks() {
  const Setting setting;
  const struct {
    const char* name;
    Group group;
  } rules[] = {
      {"decoupled", {.weight_decay = 0.01}},
      {"l2", {.weight_decay = 0.01, .decay = adamax::DecayRule::kL2}},
      {"inside", {.epsilon_rule = adamax::EpsilonRule::kInside}},
      {"l2+inside",
       {.weight_decay = 0.01,
        .decay = adamax::DecayRule::kL2,
        .epsilon_rule = adamax::EpsilonRule::kInside}},
      {"clipvalue", {.clipvalue = 0.5}},
  };
  for (const auto& rule : rules) {
    for (const int exponent : {14, 24}) {
      const std::int64_t n = std::int64_t{1} << exponent;
      add_step(std::string("rule/rule:") + rule.name + setting.name() + elements_of(n), {n}, {},
               rule.group, setting);
    }
  }
}

void add_isa_benchmarks() {
  const std::set<int> thread_counts{1, Setting{}.threads};
  for (const std::string& isa : adamax::available_isas()) {
    for (const int threads : thread_counts) {
      const Setting setting{isa, threads};
      for (const Storage& storage : {kFloats, kBFloats}) {
        for (const int exponent : {14, 20, 24}) {
          const std::int64_t n = std::int64_t{1} << exponent;
          add_step("isa" + pair_name(storage) + setting.name() + elements_of(n), {n}, {storage}, {},
                   setting);
        }
      }
    }
  }
}

// Everything at once: unscale, norm over all gradients, decay, average: 40 bytes a float32 element.
void add_full_benchmarks() {
  const Setting setting;
  const Group full{.weight_decay = 0.01};
  const Call call{.grad_scale = 1.0 / 1024, .clip = {adamax::ClipRule::kGlobalNorm, 1.0}};
  for (const Storage& storage : {kFloats, kBFloats}) {
    for (const int exponent : {14, 20, 24, 26}) {
      const std::int64_t n = std::int64_t{1} << exponent;
      add_step("full" + pair_name(storage) + setting.name() + elements_of(n), {n},
               {storage, /*average=*/true}, full, setting, call);
    }
  }
}

void add_norm_benchmarks() {
  const Setting setting;
  for (const DType dtype : {kF32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    for (const int exponent : {14, 20, 24, 26}) {
      const std::int64_t n = std::int64_t{1} << exponent;
      add("norm/dtype:" + std::string(dtype_name(dtype)) + setting.name() + elements_of(n),
          [=](benchmark::State& state) {
            setting.apply();
            const Memory memory(std::vector{n}, {{dtype, dtype}});
            const adamax::ConstBuffer gradient{dtype, n, memory.variables()[0].memory.grad};
            const auto bytes = n * static_cast<std::int64_t>(itemsize(dtype));
            report(state, n, adamax::cpu::threads_for(bytes), {memory.norm_streams()},
                   [&] { benchmark::DoNotOptimize(adamax::global_norm({&gradient, 1})); });
          });
    }
  }
}

void add_accumulate_benchmarks() {
  const Setting setting;
  for (const Storage& storage : {kFloats, kBFloats}) {
    for (const int exponent : {14, 20, 24, 26}) {
      const std::int64_t n = std::int64_t{1} << exponent;
      add("accumulate" + pair_name(storage) + setting.name() + elements_of(n),
          [=](benchmark::State& state) {
            setting.apply();
            const Memory memory(std::vector{n}, {.storage = storage, .accumulator = true});
            report(state, n, threads_of_step(memory), {memory.accumulate_streams()}, [&] {
              adamax::step(memory.variables(), Group{}, {.phase = adamax::Phase::kAccumulate});
            });
          });
    }
  }
}

// GPT-2 small: embeddings, then twelve blocks, then the last normalization; 148 tensors.
Sizes gpt2_small() {
  constexpr std::int64_t d = 768;
  Sizes sizes{50257 * d, 1024 * d};
  for (int block = 0; block < 12; ++block) {
    for (const std::int64_t size :
         {d, d, d * 3 * d, 3 * d, d * d, d, d, d, d * 4 * d, 4 * d, 4 * d * d, d}) {
      sizes.push_back(size);
    }
  }
  sizes.insert(sizes.end(), {d, d});
  return sizes;
}

// Many variables; the bound is that of one array of the same size, and so is what "flat" measures.
void add_tensor_benchmarks() {
  const Setting setting;
  const struct {
    const char* name;
    Sizes sizes;
  } lists[] = {
      {"400x256", Sizes(400, 256)}, {"160x16384", Sizes(160, 16384)}, {"gpt2-small", gpt2_small()}};
  for (const auto& list : lists) {
    std::int64_t total = 0;
    for (const std::int64_t size : list.sizes) total += size;
    const std::string prefix = std::string("tensors/list:") + list.name;
    add_step(prefix + "/as:tensors" + setting.name() + elements_of(total), list.sizes, {}, {},
             setting);
    add_step(prefix + "/as:flat" + setting.name() + elements_of(total), {total}, {}, {}, setting);
  }
}

// As many groups as variables: what a group costs beside a variable.
void add_group_benchmarks() {
  const Setting setting;
  constexpr int kVariables = 465;
  for (const int groups : {1, kVariables}) {
    add("groups/list:465x256/groups:" + std::to_string(groups) + setting.name() +
            elements_of(kVariables * 256),
        [=](benchmark::State& state) {
          setting.apply();
          const Memory memory(Sizes(kVariables, 256), {});
          std::vector<adamax::Variable> variables(memory.variables().begin(),
                                                  memory.variables().end());
          for (int i = 0; i < kVariables; ++i) variables[i].group = i % groups;
          const std::vector<Group> settings(groups, Group{.step = 1000});
          report(state, memory.elements(), threads_of_step(memory), {memory.step_streams()},
                 [&] { adamax::step(variables, settings); });
        });
  }
}

// State that would be subnormal, and gradients that are 0: the step must not become slower. The
// state is set before every step, so the time of a normal state set likewise stands beside it.
void add_subnormal_benchmarks() {
  const Setting setting;
  constexpr std::int64_t n = 1 << 16;
  for (const bool subnormal : {false, true}) {
    add(std::string("subnormal/state:") + (subnormal ? "subnormal" : "normal") + setting.name() +
            elements_of(n),
        [=](benchmark::State& state) {
          setting.apply();
          Memory memory(std::vector{n}, {});
          memory.fill_gradients(0.0);
          const double size = subnormal ? 1e-39 : 1.0;
          for (auto _ : state) {
            std::vector<double> times;
            for (int round = 0; round < 200; ++round) {
              memory.fill_state(size, size);
              times.push_back(seconds([&] { adamax::step(memory.variables(), Group{}); }, 1));
            }
            state.SetIterationTime(quantile(times, 0.5));
            state.counters["ns_per_element"] = 1e9 * quantile(times, 0.5) / n;
          }
        });
  }
}

}  // namespace
}  // namespace adamax_bench

int main(int argc, char** argv) {
  using namespace adamax_bench;
  benchmark::AddCustomContext("isas", [] {
    std::string names;
    for (const std::string& isa : adamax::available_isas())
      names += (names.empty() ? "" : ",") + isa;
    return names;
  }());
  benchmark::AddCustomContext("compiler", __VERSION__);
  add_size_benchmarks();
  add_dtype_benchmarks();
  add_low_memory_benchmarks();
  add_rule_benchmarks();
  add_isa_benchmarks();
  add_full_benchmarks();
  add_norm_benchmarks();
  add_accumulate_benchmarks();
  add_tensor_benchmarks();
  add_group_benchmarks();
  add_subnormal_benchmarks();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

// Trains two small variables through the installed C++ API and prints every array as hexadecimal
// bits, for the Python tests to compare with the reference.
#include <adamax/adamax.hpp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <stdexcept>
#include <vector>

namespace {

// Numbers that are exact in bfloat16 and the same in every language: small integers over 64.
float number(int i, int step) { return static_cast<float>((i * 37 + step * 11) % 101 - 50) / 64; }

template <class T>
void print(const char* name, std::span<const T> values) {
  std::printf("%s", name);
  for (const T& value : values) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    std::printf(" %0*llx", static_cast<int>(2 * sizeof(T)), static_cast<unsigned long long>(bits));
  }
  std::printf("\n");
}

adamax::BFloat16 to_bfloat16(float exact) {
  std::uint32_t bits;
  std::memcpy(&bits, &exact, sizeof(bits));
  return {static_cast<std::uint16_t>(bits >> 16)};
}

// Weights of bfloat16 that lose nothing, with state in 16 and in 8 bits.
void train_in_few_bits() {
  constexpr int kSize = 300, kSteps = 5;
  using Halves = std::vector<adamax::BFloat16>;
  Halves drawn(kSize), kept(kSize), gradient(kSize), m16(kSize), u16(kSize);
  std::vector<std::int8_t> m8(kSize);
  std::vector<std::uint8_t> u8(kSize);
  std::vector<std::int16_t> remainder(kSize);
  std::vector<float> scale16{1.0f}, scale8(2);
  for (int i = 0; i < kSize; ++i) drawn[i] = kept[i] = to_bfloat16(number(i, 300));
  const std::span<const adamax::BFloat16> grad(gradient);
  adamax::Variable variables[] = {
      adamax::with_stochastic_rounding(
          adamax::variable(std::span(drawn), grad, adamax::State16{m16, u16, scale16})),
      adamax::with_remainder(
          adamax::variable(std::span(kept), grad, adamax::State8{m8, u8, scale8}), remainder),
  };
  variables[1].number = 7;
  variables[1].first_element = 512;
  adamax::Group group{.learning_rate = 0.001, .seed = 12345};
  for (int step = 1; step <= kSteps; ++step) {
    for (int i = 0; i < kSize; ++i) gradient[i] = to_bfloat16(number(i, step));
    group.step = step;
    adamax::step(variables, group);
  }
  print<adamax::BFloat16>("drawn", drawn);
  print<adamax::BFloat16>("m16", m16);
  print<adamax::BFloat16>("u16", u16);
  print<float>("scale16", scale16);
  print<adamax::BFloat16>("kept", kept);
  print<std::int8_t>("m8", m8);
  print<std::uint8_t>("u8", u8);
  print<float>("scale8", scale8);
  print<std::int16_t>("remainder", remainder);
}

}  // namespace

int main() {
  constexpr int kFloats = 37, kHalves = 21, kSteps = 5;
  std::vector<float> weights(kFloats), gradient(kFloats), m(kFloats), u(kFloats), average(kFloats);
  std::vector<adamax::BFloat16> half_weights(kHalves), half_gradient(kHalves);
  std::vector<float> half_m(kHalves), half_u(kHalves), half_average(kHalves);
  for (int i = 0; i < kFloats; ++i) weights[i] = number(i, 100);
  for (int i = 0; i < kHalves; ++i) half_weights[i] = to_bfloat16(number(i, 200));

  adamax::Variable variables[] = {
      adamax::variable<float, const float>(weights, gradient, m, u, average),
      adamax::variable<adamax::BFloat16, const adamax::BFloat16>(half_weights, half_gradient,
                                                                 half_m, half_u, half_average),
  };
  // Two groups: the second one has no weight decay.
  adamax::Group groups[2];
  groups[0].learning_rate = 0.02;
  groups[0].beta_1 = 0.8;
  groups[0].beta_2 = 0.95;
  groups[0].epsilon = 1e-5;
  groups[0].ema_momentum = 0.7;
  groups[1] = groups[0];
  groups[0].weight_decay = 0.1;
  variables[1].group = 1;
  const adamax::Call call{.clip = {adamax::ClipRule::kGlobalNorm, 0.75}};
  for (int step = 1; step <= kSteps; ++step) {
    for (int i = 0; i < kFloats; ++i) gradient[i] = number(i, step);
    for (int i = 0; i < kHalves; ++i) half_gradient[i] = to_bfloat16(number(i, step + 50));
    for (adamax::Group& group : groups) group.step = step;
    adamax::step(variables, groups, call);
  }
  print<float>("w", weights);
  print<float>("m", m);
  print<float>("u", u);
  print<float>("average", average);
  print<adamax::BFloat16>("half_w", half_weights);
  print<float>("half_m", half_m);
  print<float>("half_u", half_u);
  print<float>("half_average", half_average);
  const adamax::ConstBuffer buffer{adamax::DType::kFloat32, kFloats, gradient.data()};
  const double norm = adamax::global_norm({&buffer, 1});
  print<double>("norm", {&norm, 1});
  train_in_few_bits();

  try {
    variables[1].group = 0;
    adamax::step(variables, adamax::Group{.step = 0});
    std::printf("error none\n");
  } catch (const std::invalid_argument& error) {
    std::printf("error %s\n", error.what());
  }
  try {
    adamax::Variable negative = variables[0];
    negative.size = -1;
    adamax::step({&negative, 1}, groups, call);
    std::printf("error none\n");
  } catch (const std::invalid_argument& error) {
    std::printf("error %s\n", error.what());
  }
  try {
    adamax::Variable lost = variables[0];
    lost.group = 2;
    adamax::step({&lost, 1}, groups, call);
    std::printf("error none\n");
  } catch (const std::invalid_argument& error) {
    std::printf("error %s\n", error.what());
  }
  try {
    const float rate = 0.1f;  // as if it lay in the memory of a GPU
    adamax::step(variables, adamax::Group{.device = {.learning_rate = &rate}});
    std::printf("error none\n");
  } catch (const std::invalid_argument& error) {
    std::printf("error %s\n", error.what());
  }
}

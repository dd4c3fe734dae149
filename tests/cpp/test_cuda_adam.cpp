// The GPU's step of Adam (csrc/cuda/adam_cuda.h) against the processor's.
//
// Arrays end at pages that cannot be touched, or in the GPU's own memory (guarded.h); n around the
// size of a block, and beyond what all blocks take in one round.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/adam_cpu.h"
#include "../../csrc/cuda/adam_cuda.h"
#include "check.h"
#include "guarded.h"

using Index = std::int64_t;

namespace {

std::mt19937_64 random_bits(20261125);

template <class T>
struct State {
  std::vector<T> parameter, gradient, mean, square, largest;

  explicit State(Index n) {
    std::normal_distribution<double> normal;
    for (Index i = 0; i < n; ++i) {
      parameter.push_back(static_cast<T>(normal(random_bits)));
      gradient.push_back(static_cast<T>(normal(random_bits)));
      mean.push_back(static_cast<T>(0.1 * normal(random_bits)));
      square.push_back(static_cast<T>(std::abs(normal(random_bits))));
      largest.push_back(static_cast<T>(std::abs(normal(random_bits))));
    }
  }
};

template <class T>
State<T> on_gpu(const kinml::AdamSettings& settings, State<T> s, bool amsgrad) {
  const Index n = static_cast<Index>(s.parameter.size());
  Guarded<T> arrays[5] = {{n, T(0)}, {n, T(0)}, {n, T(0)}, {n, T(0)}, {n, T(0)}};
  std::vector<T>* const all[5] = {&s.parameter, &s.gradient, &s.mean, &s.square, &s.largest};
  for (int a = 0; a < 5; ++a)
    for (Index i = 0; i < n; ++i) arrays[a][i] = (*all[a])[static_cast<std::size_t>(i)];
  double steps = static_cast<double>(settings.step - 1);
  kinml::cuda::adam_step<T>(
      settings, &steps, n, arrays[0].data(), arrays[1].data(),
      {arrays[2].data(), arrays[3].data(), amsgrad ? arrays[4].data() : nullptr}, nullptr);
  CHECK(steps == static_cast<double>(settings.step));
  for (int a = 0; a < 5; ++a)
    for (Index i = 0; i < n; ++i) (*all[a])[static_cast<std::size_t>(i)] = arrays[a][i];
  return s;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
void test_step(const kinml::AdamSettings& settings, Index n, bool amsgrad) {
  const double tolerance = sizeof(T) == 8 ? 1e-14 : 1e-6;
  const State<T> before(n);
  State<T> cpu = before;
  kinml::cpu::adam_step<T>(settings, n, cpu.parameter.data(), cpu.gradient.data(), cpu.mean.data(),
                           cpu.square.data(), amsgrad ? cpu.largest.data() : nullptr, 1);
  const State<T> gpu = on_gpu(settings, before, amsgrad);
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
    CHECK_CLOSE(gpu.parameter[i], cpu.parameter[i], tolerance, tolerance);
    CHECK_CLOSE(gpu.mean[i], cpu.mean[i], tolerance, tolerance);
    CHECK_CLOSE(gpu.square[i], cpu.square[i], tolerance, tolerance);
    CHECK_CLOSE(gpu.largest[i], cpu.largest[i], tolerance, tolerance);
  }
  CHECK(same_bits(gpu.gradient, before.gradient));
  if (!amsgrad) CHECK(same_bits(gpu.largest, before.largest));

  using kinml::cuda::StepOrder;
  for (const StepOrder order : {StepOrder::backward, StepOrder::shuffled}) {
    kinml::cuda::step_order() = order;
    const State<T> again = on_gpu(settings, before, amsgrad);
    CHECK(same_bits(again.parameter, gpu.parameter) && same_bits(again.mean, gpu.mean));
    CHECK(same_bits(again.square, gpu.square) && same_bits(again.largest, gpu.largest));
  }
  kinml::cuda::step_order() = StepOrder::forward;
}

template <class T>
void test_type() {
  const kinml::AdamSettings adam{1e-3, 0.9, 0.999, 1e-8, 0.0, false, 1};
  const kinml::AdamSettings penalty{2e-3, 0.8, 0.99, 1e-6, 0.3, false, 7};
  const kinml::AdamSettings decoupled{2e-3, 0.8, 0.99, 1e-6, 0.3, true, 1000};
  for (const Index n : {0, 1, 255, 256, 257, 1000}) {
    test_step<T>(adam, n, false);
    test_step<T>(penalty, n, false);
    test_step<T>(decoupled, n, true);
  }
  // A correction that is still not 1 when a float32 would have stopped counting.
  const kinml::AdamSettings many{2e-3, 0.9, 1 - 1e-8, 1e-6, 0.0, false, (1 << 24) + 3};
  test_step<T>(many, 300, false);
  if (!check::short_run()) test_step<T>(decoupled, 256 * 2048 + 3, true);
}

}  // namespace

int main() {
  check::section("float64");
  test_type<double>();
  check::section("float32");
  test_type<float>();
  return check::finish();
}

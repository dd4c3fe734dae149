// GFLOP/s of the networks on the CPU: 224-48-24-12-1, gaussian, two species, rows in random order.
//
// Compile as tests/cpp/test_networks.cpp says, with this file in place of the test.
//   bench_networks [seconds per figure, default 0.3]
// Prints the median and the fastest time of a call; a step is forward and weight gradients.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/networks_cpu.h"

namespace {

using Index = std::int64_t;
using Clock = std::chrono::steady_clock;

struct Times {
  double median, fastest;
};

template <class Function>
Times measure(double seconds, const Function& function) {
  for (int i = 0; i < 5; ++i) function();
  std::vector<double> times;
  const auto begin = Clock::now();
  while (times.size() < 10 ||
         std::chrono::duration<double>(Clock::now() - begin).count() < seconds) {
    const auto start = Clock::now();
    function();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front()};
}

void print(const char* what, double flop, const Times& t) {
  std::printf("  %-20s %9.1f us  %7.1f GFLOP/s   fastest %9.1f us  %7.1f GFLOP/s\n", what,
              1e6 * t.median, 1e-9 * flop / t.median, 1e6 * t.fastest, 1e-9 * flop / t.fastest);
}

template <class T>
void bench(const char* dtype, Index n_structures, int n_threads, double seconds) {
  const std::vector<Index> sizes = {224, 48, 24, 12, 1, 224, 48, 24, 12, 1};
  const std::vector<Index> activations = {1, 1, 1, 0};
  const kinml::cpu::NetworkShape shape{2, 4, sizes.data(), activations.data(), true};
  const Index n = 10 * n_structures;
  const Index stored = std::max<Index>(n, 20000);  // a data set of 2000 structures
  const std::vector<Index> starts = {0, n / 2, n};
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  std::vector<Index> order(stored);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<T> features(stored * 224), grad_features(stored * 224), grad_atomic(n), atomic(n);
  std::vector<T> parameters(shape.parameters_of(0) * 2), grad_parameters(parameters.size());
  std::vector<T> saved(n * shape.saved_per_atom());
  for (T& x : features) x = static_cast<T>(std::fabs(normal(random)));
  for (T& x : parameters) x = static_cast<T>(0.1 * normal(random));
  for (T& x : grad_atomic) x = static_cast<T>(normal(random));
  // Another part of the data set at each call, as in training.
  Index call = 0;
  const auto next_rows = [&] { return order.data() + call++ % (stored / n) * n; };
  const Index* rows = order.data();
  const auto forward = [&](T* keep) {
    kinml::cpu::networks_forward<T>(shape, parameters.data(), features.data(), 224, rows,
                                    starts.data(), keep, atomic.data(), n_threads);
  };
  const auto backward = [&](bool weights, bool inputs) {
    kinml::cpu::networks_backward<T>(shape, parameters.data(), features.data(), 224, rows,
                                     starts.data(), saved.data(), grad_atomic.data(),
                                     inputs ? grad_features.data() : nullptr,
                                     weights ? grad_parameters.data() : nullptr, n_threads);
  };
  const double first = 2.0 * 224 * 48 * n, rest = 2.0 * (48 * 24 + 24 * 12 + 12) * n;
  std::printf("%s, %lld atoms, %d thread%s\n", dtype, static_cast<long long>(n), n_threads,
              n_threads == 1 ? "" : "s");
  print("forward", first + rest, measure(seconds, [&] {
          rows = next_rows();
          forward(saved.data());
        }));
  print("inference", first + rest, measure(seconds, [&] {
          rows = next_rows();
          forward(nullptr);
        }));
  print("backward(weights)", first + 2 * rest, measure(seconds, [&] { backward(true, false); }));
  print("backward(features)", first + rest, measure(seconds, [&] { backward(false, true); }));
  print("step", 2 * first + 3 * rest, measure(seconds, [&] {
          rows = next_rows();
          forward(saved.data());
          backward(true, false);
        }));
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 0.3;
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  for (const int n_threads : {1, 2})
    for (const Index n_structures : {5, 50, 500}) {
      bench<double>("float64", n_structures, n_threads, seconds);
      bench<float>("float32", n_structures, n_threads, seconds);
    }
}

// GFLOP/s of the networks on the CPU: 224-48-24-12-1, gaussian, two species, rows in random order.
//
// Compile as tests/cpp/test_networks.cpp says, with this file in place of the test.
//   bench_networks [seconds per figure, default 0.3]
// Prints the median and the fastest time of a call; a step is forward and weight gradients. Then
// the passes of tiles of 64 and 128 atoms, against the rate of multiplications and additions in
// registers.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
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

Times summary(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front()};
}

// Times of functions that are called in turn.
template <std::size_t n>
std::array<Times, n> measure(double seconds,
                             const std::array<std::function<void()>, n>& functions) {
  std::array<std::vector<double>, n> times;
  const auto begin = Clock::now();
  for (int call = 0;
       call < 15 || std::chrono::duration<double>(Clock::now() - begin).count() < seconds; ++call)
    for (std::size_t i = 0; i < n; ++i) {
      const auto start = Clock::now();
      functions[i]();
      const double time = std::chrono::duration<double>(Clock::now() - start).count();
      if (call >= 5) times[i].push_back(time);
    }
  std::array<Times, n> results;
  for (std::size_t i = 0; i < n; ++i) results[i] = summary(std::move(times[i]));
  return results;
}

Times measure(double seconds, const std::function<void()>& function) {
  return measure<1>(seconds, {function})[0];
}

void print(const char* what, double flop, const Times& t) {
  std::printf("  %-20s %9.1f us  %7.1f GFLOP/s   fastest %9.1f us  %7.1f GFLOP/s\n", what,
              1e6 * t.median, 1e-9 * flop / t.median, 1e6 * t.fastest, 1e-9 * flop / t.fastest);
}

template <class T>
void bench(const char* dtype, Index n_structures, int n_threads, double seconds) {
  const std::vector<Index> sizes = {224, 48, 24, 12, 1, 224, 48, 24, 12, 1};
  const std::vector<Index> activations = {1, 1, 1, 0};
  const kinml::NetworkShape shape{2, 4, sizes.data(), activations.data(), true};
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

// The passes of force training on one tile, which stays in the cache.
template <class T>
void bench_tile(const char* dtype, Index n, double seconds) {
  const std::vector<Index> sizes = {224, 48, 24, 12, 1, 224, 48, 24, 12, 1};
  const std::vector<Index> activations = {1, 1, 1, 0};
  const kinml::NetworkShape shape{2, 4, sizes.data(), activations.data(), false};
  // Like molecules of C5H5 one after the other.
  std::vector<Index> rows;
  for (const Index species : {0, 1})
    for (Index i = 0; i < n; ++i)
      if (i / 5 % 2 == species) rows.push_back(i);
  const Index first =
      std::count_if(rows.begin(), rows.end(), [](Index i) { return i / 5 % 2 == 0; });
  const std::vector<Index> starts = {0, first, n};
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  std::vector<T> features(n * 224), tangents(n * 224), grad_features(n * 224), energies(n),
      seeds(n);
  std::vector<T> parameters(shape.parameters_of(0) * 2), grad_parameters(parameters.size());
  for (T& x : features) x = static_cast<T>(std::fabs(normal(random)));
  for (T& x : tangents) x = static_cast<T>(normal(random));
  for (T& x : parameters) x = static_cast<T>(0.1 * normal(random));
  for (T& x : seeds) x = static_cast<T>(normal(random));
  const kinml::cpu::PackedNetworks<T> networks(shape, parameters.data(), 1);
  std::vector<T> memory(networks.tile_memory(n) + 16);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  const kinml::cpu::NetworkTile<T> tile = {features.data(),
                                           224,
                                           rows.data(),
                                           starts.data(),
                                           memory.data() + (64 - address % 64) % 64 / sizeof(T),
                                           tangents.data(),
                                           224};
  const double big = 2.0 * 224 * 48 * n, small = 2.0 * (48 * 24 + 24 * 12 + 12) * n;
  std::printf("%s, tile of %lld atoms\n", dtype, static_cast<long long>(n));
  const auto forward = [&] { networks.forward(tile, energies.data()); };
  const auto backward = [&] { networks.backward(tile, nullptr, grad_features.data(), 224); };
  const auto tangent = [&] { networks.tangent(tile, nullptr); };
  const auto second = [&] { networks.second_backward(tile, seeds.data(), nullptr, 0); };
  const auto weights = [&] { networks.weight_gradients(tile, grad_parameters.data(), true); };
  const auto all = [&] {
    forward();
    backward();
    tangent();
    second();
    weights();
  };
  const auto pack = [&] { const kinml::cpu::PackedNetworks<T> other(shape, parameters.data(), 1); };
  const auto t = measure<7>(seconds, {forward, backward, tangent, second, weights, all, pack});
  print("forward", big + small, t[0]);
  print("backward", big + small, t[1]);
  print("tangent", big + small, t[2]);
  print("second backward", small, t[3]);
  print("weight gradients", 2 * (big + small), t[4]);
  print("all", 5 * big + 6 * small, t[5]);
  print("packing", 0, t[6]);
}

// Multiplications and additions in registers, as many as one thread can do.
template <class T>
void bench_registers(const char* dtype, double seconds) {
  constexpr int n = 24, steps = 20000;
  typedef T Register __attribute__((vector_size(64)));
  Register results[n] = {};
  T factor = T(0.5), term = T(0.25);
  const Times t = measure(seconds, [&] {
    Register sums[n], x = Register{} + factor, y = Register{} + term;
#pragma GCC unroll 24
    for (int i = 0; i < n; ++i) sums[i] = results[i];
    for (int step = 0; step < steps; ++step) {
#pragma GCC unroll 24
      for (int i = 0; i < n; ++i) sums[i] = sums[i] * x + y;
    }
#pragma GCC unroll 24
    for (int i = 0; i < n; ++i) results[i] = sums[i];
  });
  T total = 0;
  for (int i = 0; i < n; ++i) total += results[i][0];
  std::printf("%s, registers (%g)\n", dtype, static_cast<double>(total));
  print("multiply and add", 2.0 * n * steps * 64 / sizeof(T), t);
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 0.3;
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  bench_registers<double>("float64", seconds);
  bench_registers<float>("float32", seconds);
  for (const Index n : {64, 128}) {
    bench_tile<double>("float64", n, seconds);
    bench_tile<float>("float32", n, seconds);
  }
  for (const int n_threads : {1, 2})
    for (const Index n_structures : {5, 50, 500}) {
      bench<double>("float64", n_structures, n_threads, seconds);
      bench<float>("float32", n_structures, n_threads, seconds);
    }
}

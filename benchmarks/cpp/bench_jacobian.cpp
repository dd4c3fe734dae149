// GB/s of the products with stored Jacobians (C5H5: D = 224, 30 columns) by one thread, beside a
// plain read of the same memory. Structures come in random order, as in training.
//
// Compile as tests/cpp/test_networks.cpp says, with this file in place of the test and
// jacobian_kernels.cpp in place of networks_kernels.cpp (without networks_cpu.cpp).
//   bench_jacobian [structures, default 2000] [rounds, default 5]
// Prints the median of the rounds; "both" is one product after the other, structure by structure.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/jacobian_kernels.h"

namespace {

using Index = std::int64_t;
using Clock = std::chrono::steady_clock;

// Xor of all words: nothing but the reading takes time.
std::uint64_t read_all(const void* memory, Index bytes) {
  std::uint64_t sums[32] = {};
  const char* p = static_cast<const char*>(memory);
  for (Index i = 0; i + 256 <= bytes; i += 256) {
    std::uint64_t words[32];
    std::memcpy(words, p + i, 256);
    for (int k = 0; k < 32; ++k) sums[k] ^= words[k];
  }
  std::uint64_t sum = 0;
  for (const std::uint64_t s : sums) sum ^= s;
  return sum;
}

template <class T>
void bench(const char* dtype, Index n_structures, int rounds) {
  constexpr Index n = 10, length = 224, columns = 30, size = n * length * columns;
  std::vector<T> values(n_structures * size), g(n * length), r(columns), out(columns),
      v(n * length);
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  for (Index i = 0; i < size; ++i) values[i] = static_cast<T>(normal(random));
  for (Index s = 1; s < n_structures; ++s)
    std::copy(values.begin(), values.begin() + size, values.begin() + s * size);
  for (T& x : g) x = static_cast<T>(normal(random));
  for (T& x : r) x = static_cast<T>(normal(random));
  std::vector<Index> order(n_structures);
  std::iota(order.begin(), order.end(), 0);

  std::uint64_t sink = 0;
  const auto transposed = [&](const kinml::cpu::StoredJacobian<T>& j) {
    KINML_CALL_KERNEL(jacobian_transpose_product, j, g.data(), length, out.data());
  };
  const auto direct = [&](const kinml::cpu::StoredJacobian<T>& j) {
    KINML_CALL_KERNEL(jacobian_product, j, r.data(), v.data(), length);
  };
  const auto measure = [&](const char* what, const auto& function) {
    std::vector<double> times;
    for (int round = 0; round < rounds; ++round) {
      std::shuffle(order.begin(), order.end(), random);
      const auto start = Clock::now();
      for (const Index s : order)
        function(kinml::cpu::StoredJacobian<T>{values.data() + s * size, n, length, columns});
      times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    }
    std::sort(times.begin(), times.end());
    const double time = times[times.size() / 2] / n_structures;
    std::printf("  %-8s %7.1f us a structure  %6.1f GB/s\n", what, 1e6 * time,
                1e-9 * size * sizeof(T) / time);
  };
  std::printf("%s, %.0f MB\n", dtype, 1e-6 * values.size() * sizeof(T));
  measure("read", [&](const kinml::cpu::StoredJacobian<T>& j) {
    sink ^= read_all(j.values, size * sizeof(T));
  });
  measure("J^T g", transposed);
  measure("J r", direct);
  measure("both", [&](const kinml::cpu::StoredJacobian<T>& j) {
    transposed(j);
    direct(j);
  });
  if (sink == 1) std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const Index n_structures = argc > 1 ? std::atoll(argv[1]) : 2000;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 5;
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  bench<double>("float64", n_structures, rounds);
  bench<float>("float32", n_structures, rounds);
}

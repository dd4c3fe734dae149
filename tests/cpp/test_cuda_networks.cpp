// Networks on the GPU, their kernels run on the host (csrc/cuda/group.h), against those on the CPU.
//
//   test_cuda_networks          everything (seconds)
//   test_cuda_networks small    fewer problems, for valgrind and the sanitizers
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/networks_cpu.h"
#include "../../csrc/cuda/networks_cuda.h"
#include "check.h"

namespace {

namespace cuda = kinml::cuda;
using kinml::NetworkChain;
using kinml::NetworkShape;
using Index = std::int64_t;

std::mt19937_64 random_bits(20261125);

Index random_index(Index low, Index high) {
  return std::uniform_int_distribution<Index>(low, high)(random_bits);
}
double random_normal() {
  return std::normal_distribution<double>()(random_bits);
}
template <class T>
std::vector<T> random_numbers(Index n, double scale = 1) {
  std::vector<T> x;
  for (Index i = 0; i < n; ++i) x.push_back(static_cast<T>(scale * random_normal()));
  return x;
}

template <class T>
struct Problem {
  Index n_species, n_layers, length, stride, n_features, n_structures;
  std::vector<Index> sizes, activations, starts, rows, owners;
  bool biases;
  std::vector<T> features, tangents, parameters;
  std::vector<double> grad_energies;

  explicit Problem(const std::vector<Index>& counts) {
    n_species = static_cast<Index>(counts.size());
    n_layers = random_index(1, 4);
    biases = random_index(0, 1);
    length = random_index(1, random_index(0, 3) == 0 ? 300 : 40);
    for (Index s = 0; s < n_species; ++s) {
      sizes.push_back(length);
      for (Index l = 1; l < n_layers; ++l) sizes.push_back(random_index(1, 50));
      sizes.push_back(1);
    }
    for (Index l = 0; l < n_layers; ++l) activations.push_back(random_index(0, 6));
    starts = {0};
    for (const Index n : counts) starts.push_back(starts.back() + n);
    n_features = n() + random_index(0, 5);
    n_structures = random_index(1, 9);
    stride = length + random_index(0, 1) * random_index(0, 9);
    rows.resize(n_features);
    std::iota(rows.begin(), rows.end(), 0);
    std::shuffle(rows.begin(), rows.end(), random_bits);
    rows.resize(n());
    for (Index i = 0; i < n(); ++i) owners.push_back(random_index(0, n_structures - 1));
    features = random_numbers<T>(n_features * stride);
    tangents = random_numbers<T>(n_features * length);
    parameters = random_numbers<T>(NetworkChain{{shape()}}.parameters(),
                                   1 / std::sqrt(static_cast<double>(length)));
    grad_energies = random_numbers<double>(n_structures);
  }
  Index n() const { return starts.back(); }
  NetworkShape shape() const {
    return {n_species, n_layers, sizes.data(), activations.data(), biases};
  }
};

// Energies, and the gradients of both passes.
template <class T>
struct Results {
  std::vector<T> atomic, grad_atoms, grad_parameters, derivatives, second_atoms, second_parameters;
};

template <class T>
Results<T> on_cpu(const Problem<T>& p) {
  const NetworkShape shape = p.shape();
  const Index n = p.n();
  std::vector<T> saved(n * shape.saved_per_atom()), seeds;
  for (Index i = 0; i < n; ++i) seeds.push_back(static_cast<T>(p.grad_energies[p.owners[i]]));
  std::vector<T> features(p.n_features * p.length), rows(features.size());
  for (Index r = 0; r < p.n_features; ++r)
    std::copy_n(p.features.data() + r * p.stride, p.length, features.data() + r * p.length);
  Results<T> r;
  const auto of_atoms = [&] {
    std::vector<T> sorted(n * p.length);
    for (Index i = 0; i < n; ++i)
      std::copy_n(rows.data() + p.rows[i] * p.length, p.length, sorted.data() + i * p.length);
    return sorted;
  };
  r.atomic.resize(n);
  r.derivatives.resize(n);
  r.grad_parameters.resize(p.parameters.size());
  r.second_parameters.resize(p.parameters.size());
  kinml::cpu::networks_forward<T>(shape, p.parameters.data(), features.data(), p.length,
                                  p.rows.data(), p.starts.data(), saved.data(), r.atomic.data(), 1);
  kinml::cpu::networks_backward<T>(shape, p.parameters.data(), features.data(), p.length,
                                   p.rows.data(), p.starts.data(), saved.data(), seeds.data(),
                                   rows.data(), r.grad_parameters.data(), 1);
  r.grad_atoms = of_atoms();
  kinml::cpu::networks_second_backward<T>(shape, p.parameters.data(), features.data(), p.length,
                                          p.rows.data(), p.starts.data(), seeds.data(),
                                          p.tangents.data(), r.derivatives.data(), rows.data(),
                                          r.second_parameters.data(), 1);
  r.second_atoms = of_atoms();
  return r;
}

template <class T>
Results<T> on_gpu(const Problem<T>& p) {
  const cuda::ChainPlan plan = cuda::plan_chain(NetworkChain{{p.shape()}});
  const Index n = p.n(), saved_stride = p.shape().saved_per_atom();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> packed(plan.packed, nan), saved(n * saved_stride, nan);
  cuda::pack_networks<T>(plan, p.parameters.data(), 1, packed.data(), nullptr);
  const cuda::NetworkBatch<T> batch{packed.data(), p.features.data(), p.stride,        p.n_features,
                                    p.rows.data(), p.owners.data(),   p.starts.data(), n,
                                    p.n_structures};
  std::vector<double> workspace(std::max(cuda::networks_workspace<T>(plan, n, true, true),
                                         cuda::networks_workspace<T>(plan, n, false, true)) /
                                    8 +
                                1);
  char* const memory = reinterpret_cast<char*>(workspace.data());
  Results<T> r;
  r.atomic.assign(n, nan);
  r.derivatives.assign(n, nan);
  r.grad_atoms.assign(n * p.length, nan);
  r.second_atoms.assign(n * p.length, nan);
  r.grad_parameters.assign(p.parameters.size(), nan);
  r.second_parameters.assign(p.parameters.size(), nan);
  const cuda::SavedLayers<T> layers{saved.data(), saved_stride};
  cuda::networks_forward<T>(plan, batch, layers, r.atomic.data(), memory, nullptr);
  cuda::networks_backward<T>(plan, batch, layers, p.grad_energies.data(),
                             {nullptr, r.grad_atoms.data(), r.grad_parameters.data()}, memory,
                             nullptr);
  cuda::networks_second_backward<T>(
      plan, batch, p.tangents.data(), p.grad_energies.data(),
      {r.derivatives.data(), r.second_atoms.data(), r.second_parameters.data()}, memory, nullptr);
  return r;
}

template <class T>
void compare(const std::vector<T>& a, const std::vector<T>& b) {
  double largest = 0;
  for (const T x : b) largest = std::max(largest, std::abs(static_cast<double>(x)));
  // Differences of nearly equal numbers (celu, silu) cost the short type some digits, on both
  // sides.
  const double rtol = sizeof(T) == 8 ? 1e-11 : 1e-2;
  for (std::size_t i = 0; i < b.size(); ++i) CHECK_CLOSE(a[i], b[i], rtol, rtol * largest);
}
template <class T>
bool same(const Results<T>& a, const Results<T>& b) {
  return a.atomic == b.atomic && a.grad_atoms == b.grad_atoms &&
         a.grad_parameters == b.grad_parameters && a.derivatives == b.derivatives &&
         a.second_atoms == b.second_atoms && a.second_parameters == b.second_parameters;
}

template <class T>
void check_problem(const std::vector<Index>& counts) {
  const Problem<T> p(counts);
  const Results<T> expected = on_cpu(p), found = on_gpu(p);
  compare(found.atomic, expected.atomic);
  compare(found.grad_atoms, expected.grad_atoms);
  compare(found.grad_parameters, expected.grad_parameters);
  compare(found.derivatives, expected.derivatives);
  compare(found.second_atoms, expected.second_atoms);
  compare(found.second_parameters, expected.second_parameters);
  for (const auto order : {cuda::StepOrder::backward, cuda::StepOrder::shuffled}) {
    cuda::step_order() = order;
    CHECK(same(on_gpu(p), found));
  }
  cuda::step_order() = cuda::StepOrder::forward;
}

template <class T>
void check_problems(int n) {
  check::section("sizes at the edges of tiles");
  for (const Index atoms : {0, 1, 3, 4, 5, 31, 32, 33, 64, 65}) {
    check_problem<T>({atoms});
    check_problem<T>({atoms, 0, 2});
  }
  check::section("random problems");
  for (int i = 0; i < n; ++i) {
    std::vector<Index> counts;
    for (Index s = random_index(1, 4); s > 0; --s)
      counts.push_back(random_index(0, 3) == 0 ? 0 : random_index(1, random_index(0, 1) ? 9 : 120));
    check_problem<T>(counts);
  }
}

void check_tiles() {
  check::section("tiles");
  for (Index a = 0; a < 70; ++a)
    for (Index b = 0; b < 70; b += 3)
      for (Index c = 0; c < 3; ++c) {
        const Index starts[] = {0, a, a + b, a + b + c};
        const Index n = a + b + c, tiles = cuda::most_network_tiles(n, 3);
        std::vector<int> seen(n);
        bool good = true;
        for (Index tile = 0; tile < tiles + 2; ++tile) {
          const cuda::NetworkTileSpan span = cuda::network_tile(starts, 3, tile);
          good = good && span.count >= 0 && span.count <= cuda::kNetworkRows;
          good = good && (tile < tiles || span.count == 0);
          for (int row = 0; row < span.count; ++row) {
            const Index i = span.first + row;
            good = good && i >= starts[span.species] && i < starts[span.species + 1];
            if (good) ++seen[i];
          }
        }
        CHECK(good && std::all_of(seen.begin(), seen.end(), [](int x) { return x == 1; }));
      }
}

void check_packing() {
  check::section("packing");
  const Problem<double> p({3, 4});
  const cuda::ChainPlan plan = cuda::plan_chain(NetworkChain{{p.shape()}});
  std::vector<int> seen(p.parameters.size());
  for (int i = 0; i < plan.packed; ++i) {
    const cuda::PackedPlace place = cuda::packed_place(plan, i);
    if (place.parameter >= 0) ++seen[place.parameter];
  }
  // A weight stands there twice, a bias once.
  for (int s = 0; s < plan.n_species; ++s)
    for (int l = 0; l < plan.n_layers; ++l) {
      const cuda::LayerPlan& layer = plan.layer(0, s, l);
      for (int i = 0; i < layer.out * (layer.in + (plan.biases ? 1 : 0)); ++i)
        CHECK(seen[layer.parameters + i] == (i < layer.out * layer.in ? 2 : 1));
    }
}

}  // namespace

int main(int argc, char** argv) {
  const bool small_run = argc > 1 && std::string(argv[1]) == "small";
  check_tiles();
  check_packing();
  check_problems<double>(small_run ? 5 : 60);
  check_problems<float>(small_run ? 5 : 60);
  return check::finish();
}

// Networks on the CPU against a plain long double implementation.
//
//   flags="-O3 -std=c++20 -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math"
//   g++ $flags -DKINML_ISA=baseline -c csrc/cpu/networks_kernels.cpp -o baseline.o
//   g++ $flags -march=x86-64-v3 -DKINML_ISA=avx2 -c csrc/cpu/networks_kernels.cpp -o avx2.o
//   g++ $flags -march=x86-64-v4 -mprefer-vector-width=512 -DKINML_ISA=avx512
//       -c csrc/cpu/networks_kernels.cpp -o avx512.o
//   g++ $flags tests/cpp/test_networks.cpp csrc/cpu/networks_cpu.cpp csrc/cpu/dispatch.cpp
//       baseline.o avx2.o avx512.o -o test_networks
//
// The instruction set is the one of the processor or of KINML_CPU_ISA: run it once for each of
// baseline, avx2, avx512.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/core/activation.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/networks_cpu.h"
#include "../../csrc/cpu/simd_functions.h"
#include "activations.h"
#include "check.h"

using activations::curvature;
using activations::slope;
using activations::value;
using kinml::NetworkShape;
using Index = std::int64_t;
using Real = long double;

namespace {

std::mt19937_64 random_bits(20240607);

Index random_index(Index low, Index high) {
  return std::uniform_int_distribution<Index>(low, high)(random_bits);
}
double random_normal() {
  return std::normal_distribution<double>()(random_bits);
}

// ---- the reference --------------------------------------------------------------------------

// A random problem and, in long double, everything that the library should make of it.
template <class T>
struct Problem {
  Index n_species, n_layers;
  std::vector<Index> sizes, activations;
  bool biases;
  std::vector<Index> starts, rows;
  Index feature_stride, n_rows;
  std::vector<T> features, parameters, grad_atomic;

  NetworkShape shape() const {
    return {n_species, n_layers, sizes.data(), activations.data(), biases};
  }
  Index n_atoms() const { return starts.back(); }

  // Fills in everything that follows from sizes, activations, biases and the numbers of atoms.
  void fill(const std::vector<Index>& counts, Index extra_columns, Index extra_rows) {
    starts.assign(1, 0);
    for (const Index n : counts) starts.push_back(starts.back() + n);
    Index widest = 0;
    for (Index s = 0; s < n_species; ++s) widest = std::max(widest, sizes[s * (n_layers + 1)]);
    feature_stride = widest + extra_columns;
    n_rows = n_atoms() + extra_rows;
    rows.resize(n_rows);
    std::iota(rows.begin(), rows.end(), 0);
    std::shuffle(rows.begin(), rows.end(), random_bits);
    rows.resize(n_atoms());
    features.assign(n_rows * feature_stride, std::numeric_limits<T>::quiet_NaN());
    for (Index s = 0; s < n_species; ++s)
      for (Index i = starts[s]; i < starts[s + 1]; ++i)
        for (Index k = 0; k < sizes[s * (n_layers + 1)]; ++k)
          features[rows[i] * feature_stride + k] = static_cast<T>(random_normal());
    parameters.clear();
    for (Index s = 0; s < n_species; ++s)
      for (Index l = 0; l < n_layers; ++l) {
        const Index in = sizes[s * (n_layers + 1) + l], out = sizes[s * (n_layers + 1) + l + 1];
        for (Index k = 0; k < in * out; ++k)
          parameters.push_back(static_cast<T>(random_normal() / std::sqrt(double(in))));
        for (Index k = 0; biases && k < out; ++k)
          parameters.push_back(static_cast<T>(0.3 * random_normal()));
      }
    grad_atomic.clear();
    for (Index i = 0; i < n_atoms(); ++i) grad_atomic.push_back(static_cast<T>(random_normal()));
  }
};

template <class T>
Problem<T> random_problem() {
  Problem<T> p;
  p.n_species = random_index(1, 4);
  p.n_layers = random_index(1, 4);
  p.biases = random_index(0, 1);
  const Index widest = random_index(0, 3) == 0 ? 300 : 70;
  for (Index s = 0; s < p.n_species; ++s)
    for (Index l = 0; l <= p.n_layers; ++l)
      p.sizes.push_back(l == p.n_layers ? 1 : random_index(1, widest));
  for (Index l = 0; l < p.n_layers; ++l) p.activations.push_back(random_index(0, 6));
  std::vector<Index> counts;
  for (Index s = 0; s < p.n_species; ++s)
    counts.push_back(random_index(0, 3) == 0 ? 0 : random_index(1, random_index(0, 1) ? 12 : 200));
  p.fill(counts, random_index(0, 1) * random_index(0, 9), random_index(0, 5));
  return p;
}

// A result and the sum of the magnitudes of its terms, which is what rounding errors scale with.
struct Sum {
  Real value = 0, size = 0;
  void add(Real term, Real magnitude) {
    value += term;
    size += magnitude;
  }
};

struct Reference {
  std::vector<Sum> atomic, grad_features, grad_parameters;
};

template <class T>
Reference reference(const Problem<T>& p) {
  Reference r;
  const NetworkShape shape = p.shape();
  r.atomic.resize(p.n_atoms());
  r.grad_features.resize(p.features.size());
  r.grad_parameters.resize(p.parameters.size());
  Index base = 0;
  for (Index s = 0; s < p.n_species; ++s) {
    for (Index i = p.starts[s]; i < p.starts[s + 1]; ++i) {
      std::vector<std::vector<Real>> z(p.n_layers), h(p.n_layers + 1);
      const T* const x = p.features.data() + p.rows[i] * p.feature_stride;
      h[0].assign(x, x + shape.size(s, 0));
      std::vector<Index> offsets;
      Index at = base;
      Real size = 0;
      for (Index l = 0; l < p.n_layers; ++l) {
        const Index in = shape.size(s, l), out = shape.size(s, l + 1);
        offsets.push_back(at);
        for (Index j = 0; j < out; ++j) {
          Real sum = p.biases ? p.parameters[at + in * out + j] : T(0);
          for (Index k = 0; k < in; ++k) sum += h[l][k] * p.parameters[at + j * in + k];
          z[l].push_back(sum);
          h[l + 1].push_back(value(static_cast<int>(p.activations[l]), sum));
        }
        at += in * out + (p.biases ? out : 0);
      }
      for (const Real number : h[p.n_layers - 1]) size += std::fabs(number);
      r.atomic[i].add(h[p.n_layers][0], 1 + size);
      std::vector<Real> delta(1, p.grad_atomic[i]);
      for (Index l = p.n_layers - 1; l >= 0; --l) {
        const Index in = shape.size(s, l), out = shape.size(s, l + 1);
        std::vector<Real> before(in, 0), sizes(in, 0);
        for (Index j = 0; j < out; ++j) {
          delta[j] *= slope(static_cast<int>(p.activations[l]), z[l][j]);
          for (Index k = 0; k < in; ++k) {
            const Real w = p.parameters[offsets[l] + j * in + k];
            before[k] += delta[j] * w;
            sizes[k] += 1 + std::fabs(delta[j] * w);
            r.grad_parameters[offsets[l] + j * in + k].add(
                delta[j] * h[l][k], 1 + std::fabs(delta[j]) + std::fabs(delta[j] * h[l][k]));
          }
          if (p.biases)
            r.grad_parameters[offsets[l] + in * out + j].add(delta[j], 1 + std::fabs(delta[j]));
        }
        delta = before;
        if (l == 0)
          for (Index k = 0; k < in; ++k)
            r.grad_features[p.rows[i] * p.feature_stride + k].add(before[k], sizes[k]);
      }
    }
    base += shape.parameters_of(s);
  }
  return r;
}

template <class T>
struct Result {
  std::vector<T> saved, atomic, grad_features, grad_parameters;
};

constexpr double kUntouched = 12345.0;

template <class T>
Result<T> run(const Problem<T>& p, int n_threads, bool features, bool parameters) {
  const NetworkShape shape = p.shape();
  Result<T> r;
  const T junk = std::numeric_limits<T>::quiet_NaN();
  r.saved.assign(p.n_atoms() * shape.saved_per_atom(), junk);
  r.atomic.assign(p.n_atoms(), junk);
  kinml::cpu::networks_forward<T>(shape, p.parameters.data(), p.features.data(), p.feature_stride,
                                  p.rows.data(), p.starts.data(), r.saved.data(), r.atomic.data(),
                                  n_threads);
  if (features) r.grad_features.assign(p.features.size(), T(kUntouched));
  if (parameters) r.grad_parameters.assign(p.parameters.size(), junk);
  kinml::cpu::networks_backward<T>(shape, p.parameters.data(), p.features.data(), p.feature_stride,
                                   p.rows.data(), p.starts.data(), r.saved.data(),
                                   p.grad_atomic.data(),
                                   features ? r.grad_features.data() : nullptr,
                                   parameters ? r.grad_parameters.data() : nullptr, n_threads);
  return r;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Error bound: `factor` roundings of each term.
template <class T>
void check_sums(const std::vector<T>& got, const std::vector<Sum>& expected, Real factor) {
  const Real eps = std::numeric_limits<T>::epsilon();
  CHECK(got.size() == expected.size());
  for (std::size_t i = 0; i < got.size() && i < expected.size(); ++i)
    CHECK_CLOSE(got[i], expected[i].value, 0, factor * eps * expected[i].size);
}

template <class T>
void check_problem(const Problem<T>& p) {
  const Reference expected = reference(p);
  const Result<T> one = run(p, 1, true, true);
  check_sums(one.atomic, expected.atomic, 100);
  check_sums(one.grad_parameters, expected.grad_parameters, 100);

  // Rows of atoms in use are written, and nothing else.
  std::vector<Sum> features = expected.grad_features;
  for (Sum& sum : features)
    if (sum.size == 0) sum.value = kUntouched;
  check_sums(one.grad_features, features, 100);

  for (const int n_threads : {1, 2, 3, 7}) {
    const Result<T> other = run(p, n_threads, n_threads != 3, n_threads != 2);
    CHECK(same_bits(one.atomic, other.atomic));
    if (n_threads != 3) CHECK(same_bits(one.grad_features, other.grad_features));
    if (n_threads != 2) CHECK(same_bits(one.grad_parameters, other.grad_parameters));
    std::vector<T> atomic(p.n_atoms(), T(7));
    kinml::cpu::networks_forward<T>(p.shape(), p.parameters.data(), p.features.data(),
                                    p.feature_stride, p.rows.data(), p.starts.data(), nullptr,
                                    atomic.data(), n_threads);
    CHECK(same_bits(one.atomic, atomic));
  }
}

// ---- tiles ----------------------------------------------------------------------------------

// What the passes of a tile should give.
struct TileReference {
  std::vector<Sum> atomic, first_features, derivatives, second_features, first_parameters,
      second_parameters;
};

// seeds t are p.grad_atomic; tangents are rows like the features.
template <class T>
TileReference tile_reference(const Problem<T>& p, const std::vector<T>& tangents,
                             const std::vector<T>& seeds) {
  const NetworkShape shape = p.shape();
  TileReference r;
  r.atomic.resize(p.n_atoms());
  r.derivatives.resize(p.n_atoms());
  r.first_features.resize(p.features.size());
  r.second_features.resize(p.features.size());
  r.first_parameters.resize(p.parameters.size());
  r.second_parameters.resize(p.parameters.size());
  const Index L = p.n_layers;
  Index base = 0;
  for (Index s = 0; s < p.n_species; ++s) {
    std::vector<Index> offsets;
    Index at = base;
    for (Index l = 0; l < L; ++l) {
      offsets.push_back(at);
      at += shape.size(s, l + 1) * (shape.size(s, l) + (p.biases ? 1 : 0));
    }
    for (Index i = p.starts[s]; i < p.starts[s + 1]; ++i) {
      const Index row = p.rows[i] * p.feature_stride;
      const auto w = [&](Index l, Index j, Index k) {
        return static_cast<Real>(p.parameters[offsets[l] + j * shape.size(s, l) + k]);
      };
      std::vector<std::vector<Real>> h(L + 1), z(L), dh(L + 1), dz(L);
      for (Index k = 0; k < shape.size(s, 0); ++k) {
        h[0].push_back(p.features[row + k]);
        dh[0].push_back(tangents[row + k]);
      }
      Real size = 1;
      for (Index l = 0; l < L; ++l) {
        const int code = static_cast<int>(p.activations[l]);
        for (Index j = 0; j < shape.size(s, l + 1); ++j) {
          const Index in = shape.size(s, l);
          Real sum = p.biases ? p.parameters[offsets[l] + shape.size(s, l + 1) * in + j] : T(0);
          Real tangent = 0;
          for (Index k = 0; k < in; ++k) {
            sum += w(l, j, k) * h[l][k];
            tangent += w(l, j, k) * dh[l][k];
            size += std::fabs(w(l, j, k)) * (std::fabs(h[l][k]) + std::fabs(dh[l][k]));
          }
          z[l].push_back(sum);
          dz[l].push_back(tangent);
          h[l + 1].push_back(value(code, sum));
          dh[l + 1].push_back(slope(code, sum) * tangent);
        }
      }
      r.atomic[i].add(h[L][0], size);
      r.derivatives[i].add(dh[L][0], size);
      std::vector<Real> delta(1, p.grad_atomic[i]), mu(1, seeds[i]);
      for (Index l = L - 1; l >= 0; --l) {
        const int code = static_cast<int>(p.activations[l]);
        const Index in = shape.size(s, l), out = shape.size(s, l + 1);
        std::vector<Real> delta_before(in, 0), mu_before(in, 0);
        for (Index j = 0; j < out; ++j) {
          const Real f1 = slope(code, z[l][j]), f2 = curvature(code, z[l][j]);
          const Real of_h = delta[j];
          delta[j] = of_h * f1;
          mu[j] = mu[j] * f1 + of_h * f2 * dz[l][j];
          // A rounding error of z moves f' by f'' and f'' by what may be some times larger.
          const Real magnitude = size * (1 + std::fabs(of_h) + std::fabs(mu[j])) *
                                 (1 + std::fabs(dz[l][j])) * (code == 5 ? 100 : 10);
          for (Index k = 0; k < in; ++k) {
            delta_before[k] += delta[j] * w(l, j, k);
            mu_before[k] += mu[j] * w(l, j, k);
            const Index at_w = offsets[l] + j * in + k;
            const Real factor = 1 + std::fabs(h[l][k]) + std::fabs(dh[l][k]);
            r.first_parameters[at_w].add(delta[j] * h[l][k], magnitude * factor);
            r.second_parameters[at_w].add(mu[j] * h[l][k] + delta[j] * dh[l][k],
                                          magnitude * factor);
          }
          if (p.biases) {
            r.first_parameters[offsets[l] + in * out + j].add(delta[j], magnitude);
            r.second_parameters[offsets[l] + in * out + j].add(mu[j], magnitude);
          }
          if (l == 0)
            for (Index k = 0; k < in; ++k) {
              r.first_features[row + k].add(0, magnitude * (1 + std::fabs(w(l, j, k))));
              r.second_features[row + k].add(0, magnitude * (1 + std::fabs(w(l, j, k))));
            }
        }
        delta = delta_before;
        mu = mu_before;
        if (l == 0)
          for (Index k = 0; k < in; ++k) {
            r.first_features[row + k].add(delta[k], 0);
            r.second_features[row + k].add(mu[k], 0);
          }
      }
    }
    base += shape.parameters_of(s);
  }
  return r;
}

// Rows of atoms that are not named must keep kUntouched.
std::vector<Sum> rest_untouched(std::vector<Sum> sums) {
  for (Sum& sum : sums)
    if (sum.size == 0) sum.value = kUntouched;
  return sums;
}

template <class T>
struct TileResult {
  std::vector<T> atomic, first_features, derivatives, second_features, parameters;
};

// All passes; memory and results start as junk. Without tangents only those of energies.
template <class T>
TileResult<T> run_tile(const kinml::cpu::PackedNetworks<T>& networks, const Problem<T>& p,
                       const std::vector<T>& tangents, const std::vector<T>& seeds,
                       const std::vector<T>* add_to) {
  const T junk = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> memory(networks.tile_memory(p.n_atoms()) + 16, junk);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  kinml::cpu::NetworkTile<T> tile = {p.features.data(), p.feature_stride, p.rows.data(),
                                     p.starts.data(),
                                     memory.data() + (64 - address % 64) % 64 / sizeof(T)};
  if (!tangents.empty()) {
    tile.tangents = tangents.data();
    tile.tangent_stride = p.feature_stride;
  }
  TileResult<T> r;
  r.atomic.assign(p.n_atoms(), junk);
  networks.forward(tile, r.atomic.data());
  r.first_features.assign(p.features.size(), T(kUntouched));
  networks.backward(tile, p.grad_atomic.data(), r.first_features.data(), p.feature_stride);
  if (!tangents.empty()) {
    r.derivatives.assign(p.n_atoms(), junk);
    networks.tangent(tile, r.derivatives.data());
    r.second_features.assign(p.features.size(), T(kUntouched));
    networks.second_backward(tile, seeds.data(), r.second_features.data(), p.feature_stride);
  }
  r.parameters.assign(p.parameters.size(), junk);
  if (add_to != nullptr) r.parameters = *add_to;
  networks.weight_gradients(tile, r.parameters.data(), add_to != nullptr);
  return r;
}

// networks_second_backward: derivatives, features, parameters, each only if wanted.
template <class T>
TileResult<T> run_second(const Problem<T>& p, const std::vector<T>& tangents, int n_threads,
                         bool derivatives, bool features, bool parameters) {
  TileResult<T> r;
  const T junk = std::numeric_limits<T>::quiet_NaN();
  if (derivatives) r.derivatives.assign(p.n_atoms(), junk);
  if (features) r.second_features.assign(p.features.size(), T(kUntouched));
  if (parameters) r.parameters.assign(p.parameters.size(), junk);
  kinml::cpu::networks_second_backward<T>(
      p.shape(), p.parameters.data(), p.features.data(), p.feature_stride, p.rows.data(),
      p.starts.data(), p.grad_atomic.data(), tangents.data(),
      derivatives ? r.derivatives.data() : nullptr, features ? r.second_features.data() : nullptr,
      parameters ? r.parameters.data() : nullptr, n_threads);
  return r;
}

template <class T>
void check_second(const Problem<T>& p, const std::vector<T>& tangents,
                  const std::vector<Sum>& derivatives) {
  const TileReference expected = tile_reference(p, tangents, std::vector<T>(p.n_atoms(), T(0)));
  const TileResult<T> one = run_second(p, tangents, 1, true, true, true);
  check_sums(one.derivatives, derivatives, 100);
  check_sums(one.second_features, rest_untouched(expected.second_features), 1);
  check_sums(one.parameters, expected.second_parameters, 1);
  for (const int n_threads : {2, 3, 7}) {
    const TileResult<T> other =
        run_second(p, tangents, n_threads, n_threads != 2, n_threads != 3, n_threads != 7);
    if (n_threads != 2) CHECK(same_bits(one.derivatives, other.derivatives));
    if (n_threads != 3) CHECK(same_bits(one.second_features, other.second_features));
    if (n_threads != 7) CHECK(same_bits(one.parameters, other.parameters));
  }
}

template <class T>
void check_tile(const Problem<T>& p) {
  std::vector<T> tangents(p.features.size(), std::numeric_limits<T>::quiet_NaN());
  for (std::size_t i = 0; i < tangents.size(); ++i)
    if (!std::isnan(p.features[i])) tangents[i] = static_cast<T>(random_normal());
  std::vector<T> seeds(p.n_atoms());
  for (T& seed : seeds) seed = static_cast<T>(random_normal());

  const TileReference expected = tile_reference(p, tangents, seeds);
  const kinml::cpu::PackedNetworks<T> networks(p.shape(), p.parameters.data(), 1);
  const kinml::cpu::PackedNetworks<T> others(p.shape(), p.parameters.data(), 2);
  const TileResult<T> r = run_tile<T>(networks, p, tangents, seeds, nullptr);
  check_sums(r.atomic, expected.atomic, 100);
  check_sums(r.first_features, rest_untouched(expected.first_features), 1);
  check_sums(r.derivatives, expected.derivatives, 100);
  check_sums(r.second_features, rest_untouched(expected.second_features), 1);
  check_sums(r.parameters, expected.second_parameters, 1);

  check_second(p, tangents, expected.derivatives);

  const TileResult<T> again = run_tile<T>(others, p, tangents, seeds, nullptr);
  CHECK(same_bits(r.parameters, again.parameters));
  CHECK(same_bits(r.second_features, again.second_features));
  const TileResult<T> energies = run_tile<T>(networks, p, {}, seeds, nullptr);
  check_sums(energies.parameters, expected.first_parameters, 1);
  // Added to what is there: the first half of the sum may round differently.
  const TileResult<T> sum = run_tile<T>(networks, p, tangents, seeds, &energies.parameters);
  for (std::size_t i = 0; i < sum.parameters.size(); ++i)
    CHECK_CLOSE(sum.parameters[i], static_cast<Real>(r.parameters[i]) + energies.parameters[i], 0,
                4 * std::numeric_limits<T>::epsilon() * expected.second_parameters[i].size);
}

// ---- tests ----------------------------------------------------------------------------------

template <class T>
void test_random_shapes(int n) {
  check::section(sizeof(T) == 8 ? "random shapes, float64" : "random shapes, float32");
  for (int i = 0; i < n; ++i) check_problem(random_problem<T>());
}

template <class T>
void test_tiles(int n) {
  check::section(sizeof(T) == 8 ? "tiles, float64" : "tiles, float32");
  for (int i = 0; i < n; ++i) check_tile(random_problem<T>());
}

template <class T>
void test_every_activation() {
  check::section("every activation");
  for (int code = 0; code < kinml::kActivations; ++code) {
    Problem<T> p;
    p.n_species = 2;
    p.n_layers = 3;
    p.sizes = {20, 17, 9, 1, 11, 16, 8, 1};
    p.activations = {code, code, code};
    p.biases = code % 2 == 0;
    p.fill({70, 33}, 3, 2);
    check_problem(p);
    check_tile(p);
  }
}

template <class T>
void test_usual_shape() {
  check::section("50 C5H5, 224-48-24-12-1");
  Problem<T> p;
  p.n_species = 2;
  p.n_layers = 4;
  p.sizes = {224, 48, 24, 12, 1, 224, 48, 24, 12, 1};
  p.activations = {1, 1, 1, 0};
  p.biases = true;
  p.fill({250, 250}, 0, 100);
  check_problem(p);
  p.fill({33, 32}, 0, 100);
  check_tile(p);
}

// More atoms than are worked on at one time, and wide layers.
template <class T>
void test_large() {
  check::section("many atoms");
  Problem<T> p;
  p.n_species = 3;
  p.n_layers = 2;
  p.sizes = {9, 5, 1, 6, 4, 1, 9, 19, 1};
  p.activations = {2, 0};
  p.biases = true;
  p.fill({3001, 0, 1777}, 1, 0);
  check_problem(p);
  check_tile(p);

  check::section("wide layers");
  p.n_species = 1;
  p.n_layers = 3;
  p.sizes = {1000, 517, 130, 1};
  p.activations = {4, 2, 0};
  p.biases = false;
  p.fill({11}, 0, 0);
  check_problem(p);
}

void test_empty() {
  check::section("no atoms");
  Problem<double> p;
  p.n_species = 2;
  p.n_layers = 2;
  p.sizes = {4, 3, 1, 4, 3, 1};
  p.activations = {1, 0};
  p.biases = true;
  p.fill({0, 0}, 0, 0);
  const Result<double> r = run(p, 2, true, true);
  CHECK(r.grad_parameters.size() == 38);
  for (const double g : r.grad_parameters) CHECK(g == 0);
  const kinml::cpu::PackedNetworks<double> networks(p.shape(), p.parameters.data(), 1);
  const TileResult<double> tile = run_tile<double>(networks, p, {0.0}, {}, nullptr);
  for (const double g : tile.parameters) CHECK(g == 0);
  for (const double g : run_second<double>(p, {}, 2, true, true, true).parameters) CHECK(g == 0);
}

// dS/dW and dS/da of S = e f(a) + t grad f(a) . v, where grad f . v is a difference of gradients.
void test_finite_differences_of_tiles() {
  check::section("finite differences, tiles");
  Problem<double> p;
  p.n_species = 2;
  p.n_layers = 4;
  p.sizes = {13, 10, 8, 5, 1, 13, 9, 7, 3, 1};
  p.activations = {1, 6, 4, 2};
  p.biases = true;
  p.fill({5, 4}, 0, 0);
  std::vector<double> tangents(p.features.size()), seeds(p.n_atoms());
  for (double& v : tangents) v = random_normal();
  for (double& e : seeds) e = random_normal();
  const auto pass = [&](const Problem<double>& q) {
    const kinml::cpu::PackedNetworks<double> networks(q.shape(), q.parameters.data(), 1);
    return run_tile<double>(networks, q, tangents, seeds, nullptr);
  };
  const auto loss = [&](const Problem<double>& q) {
    const Result<double> s = run(q, 1, true, false);
    double sum = 0;
    for (Index i = 0; i < q.n_atoms(); ++i) sum += seeds[i] * s.atomic[i];
    for (std::size_t i = 0; i < tangents.size(); ++i) sum += tangents[i] * s.grad_features[i];
    return sum;
  };
  const double step = 1e-5;
  Problem<double> q = p;
  const auto difference = [&](double& number) {
    const double old = number;
    number = old + step;
    const double up = loss(q);
    number = old - step;
    const double down = loss(q);
    number = old;
    return (up - down) / (2 * step);
  };
  const TileResult<double> r = pass(p);
  for (std::size_t i = 0; i < p.parameters.size(); ++i)
    CHECK_CLOSE(r.parameters[i], difference(q.parameters[i]), 1e-7, 1e-7);
  for (std::size_t i = 0; i < p.features.size(); ++i)
    CHECK_CLOSE(r.second_features[i], difference(q.features[i]), 1e-7, 1e-7);
  // dS/dt
  for (Index i = 0; i < p.n_atoms(); ++i)
    CHECK_CLOSE(r.derivatives[i], difference(q.grad_atomic[i]), 1e-7, 1e-7);
}

void test_finite_differences() {
  check::section("finite differences");
  Problem<double> p;
  p.n_species = 2;
  p.n_layers = 4;
  p.sizes = {13, 10, 8, 5, 1, 13, 9, 7, 3, 1};
  p.activations = {1, 6, 4, 2};
  p.biases = true;
  p.fill({5, 4}, 0, 0);
  const Result<double> r = run(p, 1, true, true);
  const auto loss = [&](const Problem<double>& q) {
    const Result<double> s = run(q, 1, false, false);
    double sum = 0;
    for (Index i = 0; i < q.n_atoms(); ++i) sum += q.grad_atomic[i] * s.atomic[i];
    return sum;
  };
  const double step = 1e-5;
  Problem<double> q = p;
  const auto difference = [&](double& number) {
    const double old = number;
    number = old + step;
    const double up = loss(q);
    number = old - step;
    const double down = loss(q);
    number = old;
    return (up - down) / (2 * step);
  };
  for (std::size_t i = 0; i < p.parameters.size(); ++i)
    CHECK_CLOSE(r.grad_parameters[i], difference(q.parameters[i]), 1e-7, 1e-8);
  for (std::size_t i = 0; i < p.features.size(); ++i)
    CHECK_CLOSE(r.grad_features[i], difference(q.features[i]), 1e-7, 1e-8);
}

// A NaN in one atom must not reach others.
void test_nan_stays() {
  check::section("NaN stays with its atom");
  Problem<double> p;
  p.n_species = 1;
  p.n_layers = 2;
  p.sizes = {10, 6, 1};
  p.activations = {1, 0};
  p.biases = true;
  p.fill({30}, 0, 0);
  const Result<double> good = run(p, 1, false, false);
  p.features[p.rows[17] * p.feature_stride + 3] = std::numeric_limits<double>::quiet_NaN();
  const Result<double> bad = run(p, 1, false, false);
  for (Index i = 0; i < p.n_atoms(); ++i)
    CHECK(i == 17 ? std::isnan(bad.atomic[i]) : bad.atomic[i] == good.atomic[i]);
}

// Values, slopes and curvatures, as plain numbers and as registers.
template <class T, class V>
void test_activation_functions(const char* name) {
  check::section(name);
  const Real eps = std::numeric_limits<T>::epsilon();
  for (int code = 0; code < kinml::kActivations; ++code) {
    kinml::with_activation(code, [&](auto f) {
      for (int i = -4000; i <= 4000; ++i) {
        const T x = static_cast<T>(i == 1 ? 1e-9 : i * 0.00237);
        const V h = f.value(V(x));
        T got[3];
        const V all[3] = {h, f.slope(V(x), h), f.curvature(V(x), h)};
        for (int j = 0; j < 3; ++j) std::memcpy(&got[j], &all[j], sizeof(T));
        const Real first = value(code, x);
        CHECK_CLOSE(got[0], first, 16 * eps, 4 * eps);
        CHECK_CLOSE(got[1], slope(code, x), 16 * eps, 16 * eps);
        CHECK_CLOSE(got[2], curvature(code, x), 16 * eps, (code == 5 ? 64 : 16) * eps);
      }
      // Far out: no NaN, and the limits.
      for (const T x : {T(-1e4), T(-800), T(-100), T(100), T(800), T(1e4)}) {
        const V h = f.value(V(x));
        T got[2];
        const V all[2] = {h, f.slope(V(x), h)};
        for (int j = 0; j < 2; ++j) std::memcpy(&got[j], &all[j], sizeof(T));
        CHECK_CLOSE(got[0], value(code, x), 16 * eps, 1e-30L);
        CHECK_CLOSE(got[1], slope(code, x), 16 * eps, eps);
      }
    });
  }
}

template <class T>
void test_register_functions() {
  check::section("gaussian, tanh and erf of registers");
  using V = kinml::Vec<T, 16 / sizeof(T)>;
  const Real eps = std::numeric_limits<T>::epsilon();
  for (int i = -20000; i <= 20000; ++i) {
    const T x = static_cast<T>(i * 0.00051 + 1e-7);
    CHECK_CLOSE(kinml::tanh(V(x))[0], std::tanh(static_cast<Real>(x)), 4 * eps, 0);
    CHECK_CLOSE(kinml::gaussian(V(x))[0], std::exp(-static_cast<Real>(x * x)), 4 * eps,
                2 * std::numeric_limits<T>::min());
    CHECK_CLOSE(kinml::erf(V(x))[0], std::erf(static_cast<Real>(x)), 4 * eps, 0);
  }
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const T infinity = std::numeric_limits<T>::infinity();
  CHECK(std::isnan(kinml::tanh(V(nan))[0]) && std::isnan(kinml::erf(V(nan))[0]));
  CHECK(std::isnan(kinml::gaussian(V(nan))[0]) && kinml::gaussian(V(infinity))[0] < 1e-37);
  CHECK(kinml::tanh(V(infinity))[0] == 1 && kinml::tanh(V(-infinity))[0] == -1);
  CHECK(kinml::erf(V(infinity))[0] == 1 && kinml::erf(V(-infinity))[0] == -1);
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  test_register_functions<double>();
  test_register_functions<float>();
  test_activation_functions<double, double>("activations, float64");
  test_activation_functions<float, float>("activations, float32");
  test_activation_functions<double, kinml::Vec<double, 2>>("activations, registers, float64");
  test_activation_functions<float, kinml::Vec<float, 4>>("activations, registers, float32");
  test_every_activation<double>();
  test_every_activation<float>();
  test_random_shapes<double>(60);
  test_random_shapes<float>(60);
  test_tiles<double>(20);
  test_tiles<float>(20);
  test_usual_shape<double>();
  test_usual_shape<float>();
  test_large<double>();
  test_large<float>();
  test_empty();
  test_finite_differences();
  test_finite_differences_of_tiles();
  test_nan_stays();
  return check::finish();
}

// Atomic environment vectors on the CPU against a naive long double implementation, written from
// the definition (with arccos), and against finite differences of it.
//
//   test_aev          everything (seconds)
//   test_aev small    fewer and smaller molecules, for valgrind and the sanitizers
//
// The instruction set is the one of the processor or of KINML_CPU_ISA: run it once for each of
// baseline, avx2, avx512 (ctest does).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/aev_cpu.h"
#include "../../csrc/cpu/dispatch.h"
#include "check.h"

using kinml::cpu::AevBatch;
using kinml::cpu::AevParameters;
using Index = std::int64_t;
using Real = long double;

namespace {

bool small_run = false;
constexpr Real kPi = 3.14159265358979323846264338327950288L;

// The same numbers with any standard library.
std::mt19937_64 random_bits(20240611);
double uniform(double low, double high) {
  return low + (high - low) * std::ldexp(static_cast<double>(random_bits() >> 11), -53);
}
Index random_index(Index low, Index high) {
  return low + static_cast<Index>(random_bits() % static_cast<std::uint64_t>(high - low + 1));
}

// ---- parameter sets ---------------------------------------------------------------------------

AevParameters aevmod(Index n_species, int n_radial, int n_angular, int n_sections,
                     double radial_cutoff, double angular_cutoff, double beta) {
  const auto shifts = [](int n, double cutoff) {
    std::vector<double> list;
    for (int l = 0; l < n; ++l) list.push_back((l + 0.5) * cutoff / n);
    return list;
  };
  const auto eta = [](int n, double cutoff) { return std::pow(2.0 / 3.0 * cutoff / n, -2); };
  std::vector<double> sections;
  for (int m = 0; m < n_sections; ++m)
    sections.push_back(static_cast<double>(kPi) * m / std::max(n_sections - 1, 1));
  return {n_species,
          shifts(n_radial, radial_cutoff),
          eta(n_radial, radial_cutoff),
          radial_cutoff,
          1.0,
          shifts(n_angular, angular_cutoff),
          eta(n_angular, angular_cutoff),
          angular_cutoff,
          1.0,
          sections,
          8.0,
          beta};
}

// Shifts and exponents of ANI-2x: zeta is no whole number, the factors are 1/4 and 2.
AevParameters ani2x(Index n_species) {
  AevParameters p{};
  p.n_species = n_species;
  for (int l = 0; l < 16; ++l) p.radial_shifts.push_back(0.8 + 0.26875 * l);
  p.radial_eta = 19.7;
  p.radial_cutoff = 5.1;
  p.radial_factor = 0.25;
  for (int l = 0; l < 8; ++l) p.angular_shifts.push_back(0.8 + 0.3375 * l);
  p.angular_eta = 12.5;
  p.angular_cutoff = 3.5;
  p.angular_factor = 2.0;
  for (int m = 0; m < 4; ++m) p.sections.push_back(static_cast<double>(kPi) * (2 * m + 1) / 8);
  p.zeta = 14.1;
  p.beta = 0.95;
  return p;
}

struct NamedParameters {
  const char* name;
  AevParameters parameters;
};

std::vector<NamedParameters> parameter_sets() {
  std::vector<NamedParameters> sets = {
      {"aevmod, 2 species", aevmod(2, 16, 8, 8, 5.2, 3.8, 0.95)},
      {"aevmod, 4 species", aevmod(4, 16, 8, 8, 5.2, 3.8, 0.95)},
      {"ANI-2x, 3 species", ani2x(3)},
      {"one of each", aevmod(1, 1, 1, 1, 4.0, 4.0, 0.95)},
      {"odd sizes", aevmod(3, 7, 5, 3, 4.6, 3.1, 0.9)},
      {"many sections", aevmod(1, 33, 13, 19, 6.0, 3.5, 0.95)},
      {"angular cutoff is longer", aevmod(2, 5, 3, 9, 3.0, 4.5, 1.0)},
      {"beta 0", aevmod(2, 3, 2, 5, 5.0, 4.0, 0.0)},
  };
  AevParameters odd = aevmod(2, 3, 9, 17, 5.0, 3.6, 0.95);
  odd.zeta = 1;
  odd.radial_factor = -0.75;
  odd.angular_factor = 3.5;
  sets.push_back({"zeta 1", odd});
  odd.zeta = 31;
  sets.push_back({"zeta 31", odd});
  odd.zeta = 2.5;
  sets.push_back({"zeta 2.5", odd});
  return sets;
}

// ---- structures -------------------------------------------------------------------------------

// A ragged batch; coordinates are representable in float, so that both types see the same atoms.
struct Batch {
  std::vector<double> coordinates;
  std::vector<Index> species;
  std::vector<Index> offsets = {0};

  Index n_atoms() const { return offsets.back(); }
  Index n_structures() const { return static_cast<Index>(offsets.size()) - 1; }
  Index size(Index s) const { return offsets[s + 1] - offsets[s]; }

  void add_atom(double x, double y, double z, Index kind) {
    for (const double c : {x, y, z}) coordinates.push_back(static_cast<float>(c));
    species.push_back(kind);
  }
  void finish_structure() { offsets.push_back(static_cast<Index>(species.size())); }

  // Atoms at random in a box, none closer than `closest` to another, and none so near to a cutoff
  // that a finite difference would cross it.
  void add_random(Index n, Index n_species, double lx, double ly, double lz, const AevParameters& p,
                  double closest = 0.7) {
    const std::size_t first = coordinates.size();
    for (Index i = 0; i < n; ++i) {
      for (int attempt = 0;; ++attempt) {
        if (attempt == 1000) {  // too dense: a larger box
          lx *= 1.1, ly *= 1.1, lz *= 1.1;
          attempt = 0;
        }
        const double c[3] = {static_cast<float>(uniform(-lx / 2, lx / 2)),
                             static_cast<float>(uniform(-ly / 2, ly / 2)),
                             static_cast<float>(uniform(-lz / 2, lz / 2))};
        bool good = true;
        for (std::size_t j = first; good && j < coordinates.size(); j += 3) {
          const double r = std::hypot(c[0] - coordinates[j], c[1] - coordinates[j + 1],
                                      c[2] - coordinates[j + 2]);
          good = r > closest && std::fabs(r - p.radial_cutoff) > 2e-3 &&
                 std::fabs(r - p.angular_cutoff) > 2e-3;
        }
        if (!good) continue;
        add_atom(c[0], c[1], c[2], random_index(0, n_species - 1));
        break;
      }
    }
    finish_structure();
  }
  // About as dense as a molecule with its hydrogen atoms.
  void add_molecule(Index n, const AevParameters& p) {
    const double edge = 1.2 + 2.0 * std::cbrt(static_cast<double>(n));
    add_random(n, p.n_species, edge, edge, edge, p);
  }

  Batch only(Index s) const {
    Batch one;
    one.coordinates.assign(coordinates.begin() + 3 * offsets[s],
                           coordinates.begin() + 3 * offsets[s + 1]);
    one.species.assign(species.begin() + offsets[s], species.begin() + offsets[s + 1]);
    one.offsets = {0, size(s)};
    return one;
  }
};

template <class T>
std::vector<T> as(const std::vector<double>& x) {
  return std::vector<T>(x.begin(), x.end());
}

// ---- the reference ----------------------------------------------------------------------------

Real cutoff(Real r, Real radius) {
  return r <= radius ? std::cos(kPi * r / radius) / 2 + 0.5L : 0;
}

// Vectors [n_atoms, D] of one structure at coordinates x [n, 3].
std::vector<Real> reference(const AevParameters& p, const std::vector<Real>& x,
                            const Index* species, Index n) {
  const Index n_radial = p.radial_shifts.size(), n_angular = p.angular_shifts.size();
  const Index n_sections = p.sections.size();
  const Index radial = p.n_species * n_radial, block = n_angular * n_sections;
  const Index length = radial + p.n_species * (p.n_species + 1) / 2 * block;
  std::vector<Real> aev(n * length);
  std::vector<Real> gauss(n_angular), lobe(n_sections);
  for (Index i = 0; i < n; ++i) {
    Real* a = aev.data() + i * length;
    std::vector<Index> near;
    std::vector<Real> distance(n), d(3 * n);
    for (Index j = 0; j < n; ++j) {
      if (j == i) continue;
      for (int c = 0; c < 3; ++c) d[3 * j + c] = x[3 * j + c] - x[3 * i + c];
      if (std::fabs(d[3 * j]) > 20 || std::fabs(d[3 * j + 1]) > 20) continue;  // only for speed
      const Real r = std::sqrt(d[3 * j] * d[3 * j] + d[3 * j + 1] * d[3 * j + 1] +
                               d[3 * j + 2] * d[3 * j + 2]);
      distance[j] = r;
      if (r <= p.angular_cutoff) near.push_back(j);
      if (r > p.radial_cutoff) continue;
      for (Index l = 0; l < n_radial; ++l) {
        const Real shift = r - p.radial_shifts[l];
        a[species[j] * n_radial + l] +=
            p.radial_factor * std::exp(-p.radial_eta * shift * shift) * cutoff(r, p.radial_cutoff);
      }
    }
    for (std::size_t u = 0; u < near.size(); ++u)
      for (std::size_t v = u + 1; v < near.size(); ++v) {
        const Index j = near[u], k = near[v];
        Real dot = 0;
        for (int c = 0; c < 3; ++c) dot += d[3 * j + c] * d[3 * k + c];
        // Coincident atoms have no direction: their cosine counts as 0.
        const Real product = distance[j] * distance[k];
        const Real cosine = product > 0 ? dot / product : 0;
        const Real theta = std::acos(std::clamp<Real>(p.beta * cosine, -1, 1));
        const Real weight = p.angular_factor * cutoff(distance[j], p.angular_cutoff) *
                            cutoff(distance[k], p.angular_cutoff);
        for (Index l = 0; l < n_angular; ++l) {
          const Real shift = (distance[j] + distance[k]) / 2 - p.angular_shifts[l];
          gauss[l] = weight * std::exp(-p.angular_eta * shift * shift);
        }
        for (Index m = 0; m < n_sections; ++m)
          lobe[m] = std::pow(0.5L + std::cos(theta - p.sections[m]) / 2, Real(p.zeta));
        // Blocks (0,0) (0,1) .. (1,1) ..
        const Index s = std::min(species[j], species[k]), t = std::max(species[j], species[k]);
        Index pair = 0;
        for (Index before = 0; before < s; ++before) pair += p.n_species - before;
        pair += t - s;
        for (Index l = 0; l < n_angular; ++l)
          for (Index m = 0; m < n_sections; ++m)
            a[radial + pair * block + l * n_sections + m] += gauss[l] * lobe[m];
      }
  }
  return aev;
}

// The same for a batch displaced by step * direction [n_atoms, 3].
std::vector<Real> reference(const AevParameters& p, const Batch& batch,
                            const std::vector<double>* direction = nullptr, Real step = 0) {
  std::vector<Real> all;
  for (Index s = 0; s < batch.n_structures(); ++s) {
    const Index first = batch.offsets[s], n = batch.size(s);
    std::vector<Real> x(3 * n);
    for (Index i = 0; i < 3 * n; ++i) {
      x[i] = batch.coordinates[3 * first + i];
      if (direction != nullptr) x[i] += step * (*direction)[3 * first + i];
    }
    const std::vector<Real> aev = reference(p, x, batch.species.data() + first, n);
    all.insert(all.end(), aev.begin(), aev.end());
  }
  return all;
}

// First derivative along a direction, by differences of fourth order.
std::vector<Real> reference_tangent(const AevParameters& p, const Batch& batch,
                                    const std::vector<double>& direction) {
  const Real h = 2e-5L;
  std::vector<Real> sum(batch.n_atoms() * p.length());
  const Real weights[4][2] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};
  for (const auto& [steps, weight] : weights) {
    const std::vector<Real> aev = reference(p, batch, &direction, steps * h);
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += weight * aev[i] / (12 * h);
  }
  return sum;
}

// ---- the library ------------------------------------------------------------------------------

template <class T>
struct Library {
  const AevParameters& p;
  const Batch& batch;
  std::vector<T> x;
  int threads = 1;

  Library(const AevParameters& parameters, const Batch& b, int n_threads = 1)
      : p(parameters), batch(b), x(as<T>(b.coordinates)), threads(n_threads) {}

  AevBatch<T> view() const {
    return {batch.n_structures(), x.data(), batch.species.data(), batch.offsets.data()};
  }
  // Outputs begin as NaN: what is not written shows.
  static std::vector<T> room(Index n) {
    return std::vector<T>(n, std::numeric_limits<T>::quiet_NaN());
  }
  std::vector<T> forward() const {
    std::vector<T> out = room(batch.n_atoms() * p.length());
    kinml::cpu::aev_forward<T>(p, view(), out.data(), threads);
    return out;
  }
  std::vector<T> jvp(const std::vector<T>& v) const {
    std::vector<T> out = room(batch.n_atoms() * p.length());
    kinml::cpu::aev_jvp<T>(p, view(), v.data(), out.data(), threads);
    return out;
  }
  std::vector<T> vjp(const std::vector<T>& g) const {
    std::vector<T> out = room(3 * batch.n_atoms());
    kinml::cpu::aev_vjp<T>(p, view(), g.data(), out.data(), threads);
    return out;
  }
  std::vector<T> hvp(const std::vector<T>& g, const std::vector<T>& v) const {
    std::vector<T> out = room(3 * batch.n_atoms());
    kinml::cpu::aev_hvp<T>(p, view(), g.data(), v.data(), out.data(), threads);
    return out;
  }
  std::vector<T> jacobian(Index columns) const {
    std::vector<T> out = room(batch.n_atoms() * p.length() * columns);
    kinml::cpu::aev_jacobian<T>(p, view(), columns, out.data(), threads);
    return out;
  }
};

std::vector<double> random_numbers(Index n) {
  std::vector<double> list(n);
  for (double& x : list) x = static_cast<float>(uniform(-1, 1));
  return list;
}

template <class A, class B>
Real dot(const std::vector<A>& a, const std::vector<B>& b) {
  Real sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<Real>(a[i]) * b[i];
  return sum;
}
template <class A>
Real largest(const std::vector<A>& a) {
  Real most = 0;
  for (const A x : a) most = std::max(most, std::fabs(static_cast<Real>(x)));
  return most;
}
template <class A>
bool all_finite(const std::vector<A>& a) {
  return std::all_of(a.begin(), a.end(), [](A x) { return std::isfinite(x); });
}
template <class A>
bool same_bits(const std::vector<A>& a, const std::vector<A>& b) {
  if (a.size() != b.size()) return false;
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(A)) == 0;
}

template <class A>
void check_close(const std::vector<A>& got, const std::vector<Real>& expected, Real rtol,
                 Real atol) {
  CHECK(got.size() == expected.size());
  for (std::size_t i = 0; i < std::min(got.size(), expected.size()); ++i)
    CHECK_CLOSE(got[i], expected[i], rtol, atol);
}

// Tolerances by type: values and first derivatives; absolute ones for numbers of size `scale`.
template <class T>
constexpr bool is_double = sizeof(T) == 8;
template <class T>
constexpr Real kValue = is_double<T> ? 1e-12L : 5e-5L;
template <class T>
constexpr Real kGradient = is_double<T> ? 1e-10L : 5e-4L;
template <class T>
constexpr Real kFloor = is_double<T> ? 1e-14L : 2e-6L;
// With beta = 1 and atoms in a line: 16 times the root of the type's epsilon.
template <class T>
constexpr Real kLine = is_double<T> ? 2.4e-7L : 5.5e-3L;

// ---- tests ------------------------------------------------------------------------------------

Batch molecules(const AevParameters& p, Index count, Index largest_size) {
  Batch batch;
  for (Index s = 0; s < count; ++s) batch.add_molecule(random_index(1, largest_size), p);
  return batch;
}

template <class T>
void test_values(const NamedParameters& set) {
  check::section(set.name);
  const AevParameters& p = set.parameters;
  const Batch batch = molecules(p, small_run ? 3 : 12, small_run ? 12 : 40);
  const std::vector<Real> expected = reference(p, batch);
  check_close(Library<T>(p, batch).forward(), expected, kValue<T>,
              kFloor<T> * std::max<Real>(1, largest(expected)));
}

// jvp against differences of the reference; vjp, hvp and jacobian against jvp and identities.
template <class T>
void test_derivatives(const NamedParameters& set) {
  check::section(set.name);
  const AevParameters& p = set.parameters;
  const Batch batch = molecules(p, small_run ? 2 : 6, small_run ? 8 : 40);
  const Library<T> library(p, batch);
  const std::vector<double> v = random_numbers(3 * batch.n_atoms());
  const std::vector<double> w = random_numbers(3 * batch.n_atoms());
  const std::vector<double> g = random_numbers(batch.n_atoms() * p.length());
  const auto tv = as<T>(v), tw = as<T>(w), tg = as<T>(g);

  const std::vector<Real> tangent = reference_tangent(p, batch, v);
  const Real size = std::max<Real>(1, largest(tangent));
  const std::vector<T> jv = library.jvp(tv);
  check_close(jv, tangent, kGradient<T>, 10 * kFloor<T> * size + 1e-12L);

  // g . J v = v . J^T g; the sums have many terms of both signs.
  const std::vector<T> jtg = library.vjp(tg);
  const Real terms = std::sqrt(static_cast<Real>(tg.size()) + 1);
  CHECK_CLOSE(dot(jtg, v), dot(jv, g), kGradient<T>, 20 * kFloor<T> * size * terms);

  // J^T g component by component, against the same differences.
  if (batch.n_atoms() > 0) {
    for (int repeat = 0; repeat < 3; ++repeat) {
      const Index q = random_index(0, 3 * batch.n_atoms() - 1);
      std::vector<double> unit(3 * batch.n_atoms());
      unit[q] = 1;
      CHECK_CLOSE(jtg[q], dot(reference_tangent(p, batch, unit), g), kGradient<T>,
                  20 * kFloor<T> * size * terms);
    }
  }

  // hvp is symmetric, linear in the direction, and v . hvp(g, v) the second derivative along v.
  const std::vector<T> hv = library.hvp(tg, tv), hw = library.hvp(tg, tw);
  const Real curvature = std::max<Real>({1, largest(hv), largest(hw)});
  const Real tolerance = 100 * kFloor<T> * curvature * std::sqrt(3.0L * batch.n_atoms());
  CHECK_CLOSE(dot(hv, w), dot(hw, v), kGradient<T>, tolerance);
  const Real h = 2e-4L;
  Real second = -30 * dot(reference(p, batch), g);
  const Real weights[4][2] = {{-2, -1}, {-1, 16}, {1, 16}, {2, -1}};
  for (const auto& [steps, weight] : weights)
    second += weight * dot(reference(p, batch, &v, steps * h), g);
  second /= 12 * h * h;
  CHECK_CLOSE(dot(hv, v), second, is_double<T> ? 1e-7L : 1e-3L, 1e-8L * curvature + tolerance);
}

// Every component of hvp, in float64, against differences of the vjp.
void test_hessian(const NamedParameters& set) {
  check::section(set.name);
  const AevParameters& p = set.parameters;
  Batch batch = molecules(p, small_run ? 2 : 5, small_run ? 6 : 15);
  const std::vector<double> v = random_numbers(3 * batch.n_atoms());
  const std::vector<double> g = random_numbers(batch.n_atoms() * p.length());
  const std::vector<double> hv = Library<double>(p, batch).hvp(g, v);
  const std::vector<double> origin = batch.coordinates;
  const double h = 2e-4;
  std::vector<Real> expected(origin.size());
  const double weights[4][2] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};
  for (const auto& [steps, weight] : weights) {
    for (std::size_t i = 0; i < origin.size(); ++i)
      batch.coordinates[i] = origin[i] + steps * h * v[i];
    const std::vector<double> jtg = Library<double>(p, batch).vjp(g);
    for (std::size_t i = 0; i < origin.size(); ++i) expected[i] += weight * jtg[i] / (12 * h);
  }
  check_close(hv, expected, 1e-6L, 1e-8L * std::max<Real>(1, largest(expected)));
}

// Every column of the dense Jacobian is the product with a unit vector; the rest is zero. Molecules
// larger than the cutoffs: each atom has other neighbours, some have none.
template <class T>
void test_jacobian(const NamedParameters& set) {
  check::section(set.name);
  const AevParameters& p = set.parameters;
  Batch batch;
  batch.add_random(6, p.n_species, 9, 9, 9, p);
  batch.finish_structure();  // no atoms
  batch.add_random(2, p.n_species, 3, 3, 3, p);
  batch.add_random(9, p.n_species, 18, 4, 3, p);
  batch.add_random(1, p.n_species, 3, 3, 3, p);
  Index most = 0;
  for (Index s = 0; s < batch.n_structures(); ++s) most = std::max(most, batch.size(s));
  const Index columns = 3 * most + 5, length = p.length();
  const Library<T> library(p, batch);
  const std::vector<T> jacobian = library.jacobian(columns);
  CHECK(all_finite(jacobian));
  for (Index column = 0; column < columns; ++column) {
    // The same column of all structures at once.
    std::vector<T> unit(3 * batch.n_atoms());
    for (Index s = 0; s < batch.n_structures(); ++s)
      if (column < 3 * batch.size(s)) unit[3 * batch.offsets[s] + column] = 1;
    const std::vector<T> expected = library.jvp(unit);
    const Real size = std::max<Real>(1, largest(expected));
    for (Index i = 0; i < batch.n_atoms() * length; ++i)
      CHECK_CLOSE(jacobian[i * columns + column], expected[i], kGradient<T>, kFloor<T> * size);
  }
}

// Structures through the cell list, of several shapes, against all pairs in the reference.
template <class T>
void test_cells() {
  const AevParameters p = aevmod(2, 5, 2, 3, 4.2, 2.9, 0.95);
  struct Box {
    const char* name;
    Index n;
    double lx, ly, lz;
  };
  const Box boxes[] = {
      {"cells: cube", small_run ? 90 : 700, small_run ? 11.0 : 21.0, small_run ? 11.0 : 21.0,
       small_run ? 11.0 : 21.0},
      {"cells: rod", small_run ? 80 : 520, small_run ? 60.0 : 300.0, 5, 5},
      {"cells: sheet", small_run ? 80 : 600, small_run ? 22.0 : 55.0, small_run ? 22.0 : 55.0, 0},
      {"cells: far apart", 70, 5e4, 5e4, 5e4},
      {"cells: one long axis", 130, 4, 4, 2e3},
      {"cells: one more than fits into one", 65, 9, 9, 9},
  };
  for (const Box& box : boxes) {
    check::section(box.name);
    Batch batch;
    batch.add_random(box.n, 2, box.lx, box.ly, box.lz, p, 0.5);
    const Library<T> library(p, batch, 2);
    const std::vector<Real> expected = reference(p, batch);
    // Far from the origin a float has few digits left of a distance; here all are exact.
    check_close(library.forward(), expected, kValue<T>, 10 * kFloor<T>);
    const std::vector<double> v = random_numbers(3 * batch.n_atoms());
    const std::vector<double> g = random_numbers(batch.n_atoms() * p.length());
    const std::vector<T> jv = library.jvp(as<T>(v));
    if (is_double<T> && !small_run) check_close(jv, reference_tangent(p, batch, v), 1e-10L, 1e-11L);
    const std::vector<T> jtg = library.vjp(as<T>(g));
    const Real size = std::max<Real>(1, largest(jv)) * std::sqrt(static_cast<Real>(g.size()));
    CHECK_CLOSE(dot(jtg, v), dot(jv, g), kGradient<T>, 20 * kFloor<T> * size);
    const std::vector<double> w = random_numbers(3 * batch.n_atoms());
    const std::vector<T> hv = library.hvp(as<T>(g), as<T>(v)), hw = library.hvp(as<T>(g), as<T>(w));
    CHECK_CLOSE(dot(hv, w), dot(hw, v), kGradient<T>, 100 * kFloor<T> * size * largest(hv));
    // Atoms do not move the whole: forces add up to zero.
    for (int c = 0; c < 3; ++c) {
      Real sum = 0;
      for (Index i = 0; i < batch.n_atoms(); ++i) sum += jtg[3 * i + c];
      CHECK_CLOSE(sum, 0, 0, 20 * kFloor<T> * size);
    }
  }
  if (small_run) return;
  // The dense Jacobian of a structure that is cut into tasks.
  check::section("cells: Jacobian");
  const AevParameters tiny = aevmod(1, 2, 1, 1, 3.0, 2.5, 0.95);
  Batch batch;
  batch.add_random(530, 1, 19, 19, 19, tiny);
  const Library<T> library(tiny, batch, 2);
  const Index columns = 3 * batch.n_atoms();
  const std::vector<T> jacobian = library.jacobian(columns);
  const std::vector<double> v = random_numbers(columns);
  const std::vector<T> jv = library.jvp(as<T>(v));
  for (std::size_t i = 0; i < jv.size(); ++i) {
    Real sum = 0;
    for (Index c = 0; c < columns; ++c) sum += static_cast<Real>(jacobian[i * columns + c]) * v[c];
    CHECK_CLOSE(jv[i], sum, kGradient<T>, 20 * kFloor<T> * std::max<Real>(1, largest(jv)));
  }
}

Batch mixed_batch(const AevParameters& p) {
  Batch batch;
  batch.finish_structure();
  for (int s = 0; s < (small_run ? 4 : 30); ++s) {
    batch.add_molecule(random_index(1, small_run ? 8 : 40), p);
    if (s % 7 == 3) batch.finish_structure();
  }
  batch.add_random(530, p.n_species, 24, 24, 24, p);  // cut into tasks
  batch.add_molecule(5, p);
  batch.add_random(100, p.n_species, 13, 13, 13, p);  // cells, one task
  batch.finish_structure();
  return batch;
}

template <class T>
void test_same_bits() {
  const AevParameters p = aevmod(3, 5, 3, 4, 4.0, 2.8, 0.95);
  const Batch batch = mixed_batch(p);
  const auto g = as<T>(random_numbers(batch.n_atoms() * p.length()));
  const auto v = as<T>(random_numbers(3 * batch.n_atoms()));
  const Library<T> one(p, batch, 1);
  const std::vector<T> a = one.forward(), jv = one.jvp(v), jtg = one.vjp(g), hv = one.hvp(g, v);
  CHECK(all_finite(a) && all_finite(jv) && all_finite(jtg) && all_finite(hv));

  check::section("same bits for any number of threads");
  Batch few;
  for (int s = 0; s < 9; ++s) few.add_molecule(random_index(1, 20), p);
  const Index columns = 3 * 20;
  const std::vector<T> jacobian = Library<T>(p, few, 1).jacobian(columns);
  for (const int threads : {2, 3, 7}) {
    const Library<T> other(p, batch, threads);
    CHECK(same_bits(a, other.forward()));
    CHECK(same_bits(jv, other.jvp(v)));
    CHECK(same_bits(jtg, other.vjp(g)));
    CHECK(same_bits(hv, other.hvp(g, v)));
    CHECK(same_bits(jacobian, Library<T>(p, few, threads).jacobian(columns)));
  }

  // Nor does a structure know its neighbours in the batch.
  check::section("same bits alone and in a batch");
  for (Index s = 0; s < batch.n_structures(); ++s) {
    const Batch alone = batch.only(s);
    const Index first = batch.offsets[s], last = batch.offsets[s + 1], length = p.length();
    const std::vector<T> part(a.begin() + first * length, a.begin() + last * length);
    CHECK(same_bits(part, Library<T>(p, alone).forward()));
    const std::vector<T> own(g.begin() + first * length, g.begin() + last * length);
    const std::vector<T> force(jtg.begin() + 3 * first, jtg.begin() + 3 * last);
    CHECK(same_bits(force, Library<T>(p, alone).vjp(own)));
  }
}

// Several threads call the library at once, as a program with its own threads does.
void test_callers() {
  check::section("several callers");
  const AevParameters p = aevmod(2, 16, 8, 8, 5.2, 3.8, 0.95);
  const Batch batch = molecules(p, 6, 15);
  const auto g = random_numbers(batch.n_atoms() * p.length());
  const std::vector<double> expected = Library<double>(p, batch).vjp(g);
  std::vector<std::vector<double>> results(4);
  std::vector<std::thread> callers;
  for (std::size_t i = 0; i < results.size(); ++i)
    callers.emplace_back(
        [&, i] { results[i] = Library<double>(p, batch, i % 2 == 0 ? 1 : 2).vjp(g); });
  for (std::thread& caller : callers) caller.join();
  for (const auto& result : results) CHECK(same_bits(result, expected));
}

template <class T>
void test_empty() {
  check::section("nothing");
  const AevParameters p = aevmod(2, 16, 8, 8, 5.2, 3.8, 0.95);
  Batch none;
  for (int structures = 0; structures < 3; ++structures) {
    const Library<T> library(p, none, 2);
    CHECK(library.forward().empty() && library.vjp({}).empty() && library.jvp({}).empty());
    CHECK(library.hvp({}, {}).empty() && library.jacobian(0).empty());
    none.finish_structure();
  }
  check::section("one atom");
  Batch atom;
  atom.add_atom(1, 2, 3, 1);
  atom.finish_structure();
  const Library<T> library(p, atom);
  const std::vector<T> ones(p.length(), T(1));
  CHECK(largest(library.forward()) == 0 && largest(library.vjp(ones)) == 0);
  CHECK(largest(library.jvp({1, 1, 1})) == 0 && largest(library.hvp(ones, {1, 1, 1})) == 0);
  CHECK(largest(library.jacobian(3)) == 0);
}

// All ops are finite; forward agrees with the reference.
template <class T>
void check_degenerate(const AevParameters& p, const Batch& batch, Real atol) {
  const Library<T> library(p, batch);
  check_close(library.forward(), reference(p, batch), kValue<T>, atol);
  const auto g = as<T>(random_numbers(batch.n_atoms() * p.length()));
  const auto v = as<T>(random_numbers(3 * batch.n_atoms()));
  const std::vector<T> jv = library.jvp(v), jtg = library.vjp(g);
  CHECK(all_finite(jv));
  CHECK(all_finite(jtg));
  CHECK(all_finite(library.hvp(g, v)));
  CHECK(all_finite(library.jacobian(3 * batch.n_atoms())));
  const Real size = std::max<Real>(1, largest(jv)) * std::sqrt(static_cast<Real>(g.size()));
  CHECK_CLOSE(dot(jtg, v), dot(jv, g), kGradient<T>, 20 * kFloor<T> * size);
}

template <class T>
void test_coincident() {
  check::section("coincident atoms");
  for (const double beta : {0.95, 1.0}) {
    const AevParameters p = aevmod(2, 8, 4, 5, 5.2, 3.8, beta);
    Batch batch;
    batch.add_atom(0.1, 0.2, 0.3, 0);
    batch.add_atom(0.1, 0.2, 0.3, 1);
    batch.add_atom(1.1, 0.4, -0.3, 0);
    batch.add_atom(0.1, 0.2, 0.3, 1);
    batch.add_atom(-0.6, 0.9, 0.8, 1);
    batch.finish_structure();
    // Seen from others they stand in one line, where sin(theta) is uncertain (test_collinear).
    check_degenerate<T>(p, batch, beta < 1 ? kFloor<T> : kLine<T>);
  }
}

template <class T>
void test_collinear() {
  check::section("collinear atoms, beta 1");
  for (const double zeta : {8.0, 14.1, 1.0}) {
    AevParameters p = aevmod(2, 8, 4, 5, 5.2, 3.8, 1.0);
    p.zeta = zeta;
    Batch batch;
    for (const double x : {0.0, 1.0, 2.25, -1.5, 3.0}) batch.add_atom(x, 0, 0, x > 1.5);
    batch.finish_structure();
    check_degenerate<T>(p, batch, kFloor<T>);
    // In a slanted line cos(angle) is 1 but for rounding: sin(theta) is uncertain by the root of
    // it.
    Batch slanted;
    for (const double x : {0.0, 1.0, 2.25, -1.5, 3.0}) slanted.add_atom(x, 0.5 * x, -0.25 * x, 0);
    slanted.finish_structure();
    check_degenerate<T>(p, slanted, kLine<T>);
  }
}

// A distance beside a cutoff, and exactly at it.
template <class T>
void test_at_cutoff() {
  check::section("at the cutoff");
  const AevParameters p = aevmod(1, 6, 3, 4, 5.0, 3.5, 0.95);
  for (const double r : {3.5, 5.0, 3.4999998, 3.5000002, 4.9999995, 5.0000005}) {
    Batch batch;
    batch.add_atom(0, 0, 0, 0);
    batch.add_atom(r, 0, 0, 0);
    batch.add_atom(0, 1.5, 0, 0);
    batch.finish_structure();
    const Library<T> library(p, batch);
    check_close(library.forward(), reference(p, batch), kValue<T>, kFloor<T>);
    std::vector<double> v(9);
    v[3] = 1;
    const auto g = as<T>(random_numbers(3 * p.length()));
    CHECK(all_finite(library.hvp(g, as<T>(v))));
    CHECK_CLOSE(dot(library.vjp(g), v), dot(library.jvp(as<T>(v)), g), kGradient<T>,
                100 * kFloor<T>);
  }
}

// Rotation and translation change nothing; exchanging two atoms exchanges their vectors.
void test_symmetry() {
  check::section("symmetries");
  const AevParameters p = aevmod(2, 16, 8, 8, 5.2, 3.8, 0.95);
  Batch batch;
  batch.add_molecule(12, p);
  const std::vector<double> before = Library<double>(p, batch).forward();
  Batch turned = batch;
  const double angle = 0.7, c = std::cos(angle), s = std::sin(angle);
  for (Index i = 0; i < batch.n_atoms(); ++i) {
    const double* x = batch.coordinates.data() + 3 * i;
    const double y[3] = {c * x[0] - s * x[2] + 3, s * x[0] + c * x[2] - 8, x[1] + 0.25};
    std::copy(y, y + 3, turned.coordinates.data() + 3 * i);
  }
  const std::vector<double> after = Library<double>(p, turned).forward();
  for (std::size_t i = 0; i < before.size(); ++i) CHECK_CLOSE(after[i], before[i], 1e-11L, 1e-13L);

  Batch reversed;
  for (Index i = batch.n_atoms() - 1; i >= 0; --i) {
    const double* x = batch.coordinates.data() + 3 * i;
    reversed.add_atom(x[0], x[1], x[2], batch.species[i]);
  }
  reversed.finish_structure();
  const std::vector<double> other = Library<double>(p, reversed).forward();
  for (Index i = 0; i < batch.n_atoms(); ++i)
    for (Index k = 0; k < p.length(); ++k)
      CHECK_CLOSE(other[(batch.n_atoms() - 1 - i) * p.length() + k], before[i * p.length() + k],
                  1e-12L, 1e-14L);
}

template <class T>
void test_type() {
  for (const NamedParameters& set : parameter_sets()) {
    test_values<T>(set);
    test_derivatives<T>(set);
    test_jacobian<T>(set);
  }
  test_cells<T>();
  test_same_bits<T>();
  test_empty<T>();
  test_coincident<T>();
  test_collinear<T>();
  test_at_cutoff<T>();
}

}  // namespace

int main(int n_arguments, char** arguments) {
  small_run = n_arguments > 1 && std::string(arguments[1]) == "small";
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  test_type<double>();
  test_type<float>();
  for (const NamedParameters& set : parameter_sets()) test_hessian(set);
  test_callers();
  test_symmetry();
  return check::finish();
}

// Random molecules, parameter sets, and the definition of atomic environment vectors in plain long
// double (with arccos): what the tests of the AEV and of the fused step hold the library against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/aev_cpu.h"
#include "check.h"

namespace molecules {

using kinml::AevParameters;
using Index = std::int64_t;
using Real = long double;

inline constexpr Real kPi = 3.14159265358979323846264338327950288L;

// The same numbers with any standard library.
inline std::mt19937_64 random_bits(20240611);
inline double uniform(double low, double high) {
  return low + (high - low) * std::ldexp(static_cast<double>(random_bits() >> 11), -53);
}
inline Index random_index(Index low, Index high) {
  return low + static_cast<Index>(random_bits() % static_cast<std::uint64_t>(high - low + 1));
}

// ---- parameter sets ---------------------------------------------------------------------------

inline AevParameters aevmod(Index n_species, int n_radial, int n_angular, int n_sections,
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
inline AevParameters ani2x(Index n_species) {
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

inline std::vector<NamedParameters> parameter_sets() {
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

  // All atoms within the angular cutoff of one another.
  void add_cluster(Index n, const AevParameters& p) {
    const double edge = 0.57 * p.angular_cutoff;  // the cube's diagonal is shorter than the cutoff
    add_random(n, p.n_species, edge, edge, edge, p, 0.35);
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

inline Real cutoff(Real r, Real radius) {
  return r <= radius ? std::cos(kPi * r / radius) / 2 + 0.5L : 0;
}

// Vectors [n_atoms, D] of one structure at coordinates x [n, 3].
inline std::vector<Real> reference(const AevParameters& p, const std::vector<Real>& x,
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
inline std::vector<Real> reference(const AevParameters& p, const Batch& batch,
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
inline std::vector<Real> reference_tangent(const AevParameters& p, const Batch& batch,
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

// ---- lists of numbers -------------------------------------------------------------------------

inline std::vector<double> random_numbers(Index n) {
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

}  // namespace molecules

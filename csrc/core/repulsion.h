// The repulsion of nuclei at short distances, where there are no data: a pair potential that is
// part of a model beside its networks.
//
//   phi(r) = Z_i Z_j e^2 / (4 pi eps0 r) * sum_k c_k exp(-d_k r / a) * S(t)
//   a      = 0.4685 angstrom / (Z_i^0.23 + Z_j^0.23)
// the universal screened potential of Ziegler, Biersack and Littmark (The Stopping and Range of Ions
// in Matter, Pergamon 1985), times a switch that is 1 up to an inner and 0 beyond an outer distance,
// S(t) = 1 - t^3 (10 - 15 t + 6 t^2) in between, whose first two derivatives are 0 at both. These
// distances are fractions of the sum of the two atoms' radii, so that no bond at its equilibrium
// feels it. Each of the two atoms has half of phi.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "config.h"
#include "dual.h"

namespace kinml {

struct Repulsion {
  std::vector<double> charges;      // [n_species] Z; empty: there is none
  std::vector<double> radii;        // [n_species] angstrom
  double inner = 0.0, outer = 0.0;  // 0 <= inner < outer, of the sum of two radii

  bool any() const { return !charges.empty(); }
  // Beyond which no two atoms repel each other.
  double cutoff() const {
    double largest = 0;
    for (const double radius : radii) largest = largest > radius ? largest : radius;
    return 2 * outer * largest;
  }
};

// What the formula takes of two species.
template <class T>
struct RepulsionPair {
  T strength;       // half of Z_i Z_j e^2 / (4 pi eps0), eV angstrom
  T inverse_a;      // 1 / angstrom
  T inner, outer;   // angstrom
  T inverse_width;  // 1 / (outer - inner)
};

inline namespace KINML_ISA {

// Of one species.
template <class T>
struct RepulsionSpecies {
  T charge, power, radius;  // power: of the charge, as it is in a
};

template <class T>
KINML_HD RepulsionPair<T> repulsion_pair(const RepulsionSpecies<T>& i, const RepulsionSpecies<T>& j,
                                         T inner, T outer) {
  const T radii = i.radius + j.radius;
  return {T(14.399645478 / 2) * i.charge * j.charge, (i.power + j.power) * T(1 / 0.4685),
          inner * radii, outer * radii, T(1) / ((outer - inner) * radii)};
}

template <class N>
struct Repelled {
  N value, slope;  // phi / 2 and its derivative by the distance
};

// Of numbers N of type T, or Dual<T>.
template <class N, class T>
KINML_HD Repelled<N> repulsion(N r, const RepulsionPair<T>& p) {
  if (value_of(r) >= p.outer) return {N(T(0)), N(T(0))};
  using std::exp;
  const N x = r * N(p.inverse_a);
  N sum(T(0)), derivative(T(0));
  const auto add = [&](T c, T d) {
    const N term = N(c) * exp(N(-d) * x);
    sum += term;
    derivative -= N(d) * term;
  };
  add(T(0.02817), T(0.20162));
  add(T(0.28022), T(0.40290));
  add(T(0.50986), T(0.94229));
  add(T(0.18175), T(3.19980));
  const N coulomb = N(p.strength) / r, phi = coulomb * sum;
  const N slope = coulomb * N(p.inverse_a) * derivative - phi / r;
  if (value_of(r) <= p.inner) return {phi, slope};
  const N one(T(1)), t = (r - N(p.inner)) * N(p.inverse_width);
  const N on = one - t * t * t * (N(T(10)) - t * (N(T(15)) - N(T(6)) * t));
  const N falls = N(T(-30) * p.inverse_width) * (t * t) * ((one - t) * (one - t));
  return {phi * on, slope * on + phi * falls};
}

}  // namespace KINML_ISA

inline std::vector<RepulsionSpecies<double>> repulsion_species(const Repulsion& r) {
  std::vector<RepulsionSpecies<double>> species;
  for (std::size_t i = 0; i < r.charges.size(); ++i)
    species.push_back({r.charges[i], std::pow(r.charges[i], 0.23), r.radii[i]});
  return species;
}
// [n_species, n_species]
template <class T>
std::vector<RepulsionPair<T>> repulsion_pairs(const Repulsion& r) {
  const std::vector<RepulsionSpecies<double>> species = repulsion_species(r);
  std::vector<RepulsionPair<T>> pairs;
  for (const RepulsionSpecies<double>& i : species)
    for (const RepulsionSpecies<double>& j : species) {
      const RepulsionPair<double> p = repulsion_pair(i, j, r.inner, r.outer);
      pairs.push_back({static_cast<T>(p.strength), static_cast<T>(p.inverse_a),
                       static_cast<T>(p.inner), static_cast<T>(p.outer),
                       static_cast<T>(p.inverse_width)});
    }
  return pairs;
}

}  // namespace kinml

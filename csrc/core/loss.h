// Loss: targets and weights of a data set, and what one structure at one level of theory
// contributes to the loss of a batch. The pointers are of the device that computes.
//
//   L_E = sum_k sum_s w_ks dE_ks^2 / n_E,k
//   L_F = sum_k sum_s u_ks (mean over 3 n_s components of dF_ks^2) / n_F,k
//   L_S = sum_k sum_s t_ks (mean over 9 components of dS_ks^2) / n_S,k
//   loss = scales[0] L_E + scales[1] L_F + scales[2] L_S
//
// eV^2, eV^2/angstrom^2 and eV^2/angstrom^6; S = virial / volume of the cell. n_E,k, n_F,k, n_S,k count the structures of the whole batch whose weight at
// level k is not 0. They are arguments: who computes a part of the batch cannot count them. A
// structure without weight may have no target (NaN), which is not looked at then.
#pragma once

#include <cstdint>

#include "config.h"

namespace kinml {

struct Loss {
  std::int64_t n_levels, n_structures, n_atoms;  // K, and numbers of the data set
  const double* energies;        // [K, n_structures] targets without single-atom energies
  const double* energy_weights;  // [K, n_structures] w
  const double* forces;          // [K, n_atoms, 3] targets; null, like their weights: no forces
  const double* force_weights;   // [K, n_structures] u
  const double* scales;          // [2], with stresses [3]
  const double* counts;          // [2, K] n_E,k and n_F,k; with stresses [3, K], n_S,k
  const double* stresses;        // [K, n_structures, 3, 3] targets; null: no stresses
  const double* stress_weights;  // [K, n_structures] t; 0 for a structure without periodicity

  KINML_HD bool with_stresses() const { return stresses != nullptr; }
  KINML_HD bool with_forces() const { return forces != nullptr || with_stresses(); }
  // L_E, L_F and, with stresses, L_S.
  KINML_HD int n_terms() const { return with_stresses() ? 3 : 2; }
  // Numbers of a row of errors: those of the forces and, with stresses, of these.
  KINML_HD int error_numbers() const { return with_stresses() ? 6 : 3; }

  // ---- energies: dE = E - target of structure s at level k

  KINML_HD double energy_weight(std::int64_t k, std::int64_t s) const {
    return energy_weights[k * n_structures + s];
  }
  KINML_HD double energy_residual(std::int64_t k, std::int64_t s, double energy) const {
    return energy - energies[k * n_structures + s];
  }
  // d(loss)/dE
  KINML_HD double energy_slope(std::int64_t k, std::int64_t s, double residual) const {
    const double w = energy_weight(k, s);
    return w == 0 ? 0.0 : 2 * scales[0] / counts[k] * w * residual;
  }
  // What is added to n_E,k L_E.
  KINML_HD double energy_term(std::int64_t k, std::int64_t s, double residual) const {
    const double w = energy_weight(k, s);
    return w == 0 ? 0.0 : w * residual * residual;
  }

  // The share of level k in L_E, from the sum of these; 0 where nothing counts.
  KINML_HD double energy_mean(std::int64_t k, double terms) const {
    return counts[k] == 0 ? terms : terms / counts[k];
  }

  // ---- forces: dF = F - target of the components of structure s at level k

  KINML_HD double force_weight(std::int64_t k, std::int64_t s) const {
    return force_weights == nullptr ? 0.0 : force_weights[k * n_structures + s];
  }
  // Targets of the atoms from `first_atom` on.
  KINML_HD const double* force_targets(std::int64_t k, std::int64_t first_atom) const {
    return forces + 3 * (k * n_atoms + first_atom);
  }
  // d(loss)/dF = force_slope dF, of a structure of so many components.
  KINML_HD double force_slope(std::int64_t k, std::int64_t s, std::int64_t components) const {
    return 2 * scales[1] / counts[n_levels + k] * force_weight(k, s) /
           static_cast<double>(components);
  }
  // What is added to n_F,k L_F by a structure with this sum of dF^2.
  KINML_HD double force_term(std::int64_t k, std::int64_t s, double squares,
                             std::int64_t components) const {
    const double u = force_weight(k, s);
    return u == 0 || components == 0 ? 0.0 : u * squares / static_cast<double>(components);
  }
  // The share of level k in L_F, likewise.
  KINML_HD double force_mean(std::int64_t k, double terms) const {
    return counts[n_levels + k] == 0 ? terms : terms / counts[n_levels + k];
  }

  // ---- stresses: dS = virial / volume - target

  KINML_HD double stress_weight(std::int64_t k, std::int64_t s) const {
    return stress_weights == nullptr ? 0.0 : stress_weights[k * n_structures + s];
  }
  KINML_HD double stress_difference(std::int64_t k, std::int64_t s, int component, double virial,
                                    double volume) const {
    return virial / volume - stresses[9 * (k * n_structures + s) + component];
  }
  // d(loss)/dvirial = stress_slope dS
  KINML_HD double stress_slope(std::int64_t k, std::int64_t s, double volume) const {
    return 2 * scales[2] / counts[2 * n_levels + k] * stress_weight(k, s) / (9 * volume);
  }
  KINML_HD double stress_term(std::int64_t k, std::int64_t s, double squares) const {
    const double t = stress_weight(k, s);
    return t == 0 ? 0.0 : t * squares / 9;
  }
  KINML_HD double stress_mean(std::int64_t k, double terms) const {
    return counts[2 * n_levels + k] == 0 ? terms : terms / counts[2 * n_levels + k];
  }
};

// Errors of the force or stress components of a structure at a level: sum |d|, sum d^2, max |d|.
struct ComponentErrors {
  double sum = 0, squares = 0, largest = 0;

  KINML_HD void add(double difference) {
    const double size = difference < 0 ? -difference : difference;
    sum += size;
    squares += difference * difference;
    largest = larger(size);
  }
  KINML_HD void add(const ComponentErrors& other) {
    sum += other.sum;
    squares += other.squares;
    largest = larger(other.largest);
  }
  // As rows of errors: [3]
  KINML_HD void write(double* to) const {
    to[0] = sum;
    to[1] = squares;
    to[2] = largest;
  }

 private:
  // NaN stays.
  KINML_HD double larger(double size) const {
    return size > largest || size != size ? size : largest;
  }
};

}  // namespace kinml

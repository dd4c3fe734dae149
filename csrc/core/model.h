// Model: what atomic environment vectors are made of, the chain of networks on top of them, and
// their weights.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "aev_layout.h"
#include "aev_numbers.h"
#include "network_shape.h"
#include "repulsion.h"

namespace kinml {

struct AevParameters {
  std::int64_t n_species;
  std::vector<double> radial_shifts;  // rho_l, angstrom
  double radial_eta;                  // 1/angstrom^2
  double radial_cutoff;               // angstrom
  double radial_factor;
  std::vector<double> angular_shifts;  // rho_l, angstrom
  double angular_eta;
  double angular_cutoff;
  double angular_factor;
  std::vector<double> sections;  // alpha_m, rad
  double zeta;
  double beta;  // theta = arccos(beta cos(angle))

  // What is added to the energy of each atom beside the networks. Parameters without shifts are of
  // the repulsion alone: then the vector of an atom is one number, its share of that energy.
  Repulsion repulsion{};

  bool is_repulsion() const { return radial_shifts.empty(); }
  AevParameters of_repulsion() const {
    AevParameters p{};
    p.n_species = n_species;
    p.radial_cutoff = repulsion.cutoff();
    p.repulsion = repulsion;
    return p;
  }
  AevLayout layout() const {
    return {static_cast<int>(n_species), static_cast<int>(radial_shifts.size()),
            static_cast<int>(angular_shifts.size()), static_cast<int>(sections.size())};
  }
  std::int64_t length() const { return is_repulsion() ? 1 : layout().length(); }  // D
};

template <class T>
AevNumbers<T> aev_numbers(const AevParameters& p) {
  const auto number = [](double x) { return static_cast<T>(x); };
  const AevLayout layout = p.layout();
  const bool whole = p.zeta >= 1 && p.zeta <= 1024 && p.zeta == std::floor(p.zeta);
  return {.n_species = layout.n_species,
          .n_radial = layout.n_radial,
          .n_angular = layout.n_angular,
          .n_sections = layout.n_sections,
          .radial_eta = number(p.radial_eta),
          .radial_cutoff = number(p.radial_cutoff),
          .radial_factor = number(p.radial_factor),
          .angular_eta = number(p.angular_eta),
          .angular_cutoff = number(p.angular_cutoff),
          .angular_factor = number(p.angular_factor),
          .beta = number(p.beta),
          .zeta = number(p.zeta),
          .integer_zeta = whole ? static_cast<int>(p.zeta) : -1};
}

// One model, or an ensemble of models that differ in their weights. The pointers are of the device
// that computes, the descriptions in host memory.
template <class T>
struct Model {
  AevParameters aev;      // not looked at for stored descriptors
  NetworkChain networks;  // K levels of theory
  const T* weights = nullptr;
  std::int64_t n_members = 1;  // weights [n_members, networks.parameters()]
  // Single-atom energies of the R levels that are evaluated, eV; null: none.
  const double* sae = nullptr;  // [n_members, R, n_species]
};

}  // namespace kinml

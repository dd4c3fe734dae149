// The parameters of atomic environment vectors in the type of a computation, as far as they are
// single numbers: what the tables of all devices begin with.
#pragma once

#include "aev_layout.h"
#include "config.h"

namespace kinml {

template <class T>
struct AevNumbers {
  int n_species = 0, n_radial = 0, n_angular = 0, n_sections = 0;
  T radial_eta, radial_cutoff, radial_factor;
  T angular_eta, angular_cutoff, angular_factor;
  T beta, zeta;
  int integer_zeta = -1;  // zeta when it is a whole number >= 1, else -1

  KINML_HD AevLayout layout() const { return {n_species, n_radial, n_angular, n_sections}; }
};

}  // namespace kinml

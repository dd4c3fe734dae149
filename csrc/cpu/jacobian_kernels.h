// Products of the stored Jacobian of one structure: the second source of g -> forces, r -> J r.
//
// A structure of n atoms has J [n, D, columns], columns >= 3 n, row-major: J[i, d, 3 j + k] is the
// derivative of entry d of atom i's descriptor with respect to coordinate k of atom j. Columns
// from 3 n on are padding that need not be initialised: they are neither read nor summed, so the
// results do not depend on how far a data set is padded.
//
// Both products read J once, at the rate of the memory. The second goes through the atoms in
// reverse order: called soon after the first, it meets what is left of J in the cache first.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace kinml::cpu {

template <class T>
struct StoredJacobian {
  const T* values;       // [n_atoms, length, columns]
  std::int64_t n_atoms;  // of the structure
  std::int64_t length;   // D, numbers of a descriptor
  std::int64_t columns;  // >= 3 n_atoms
};

}  // namespace kinml::cpu

namespace kinml {
// out[c] = sum_i sum_d J[i, d, c] g[i, d] for c < 3 n_atoms, in this order of i and d.
// g [n_atoms, D] has rows `stride` numbers apart; out [3 n_atoms] must not overlap J or g.
KINML_DECLARE_KERNEL(void, jacobian_transpose_product, const cpu::StoredJacobian<double>& jacobian,
                     const double* g, std::int64_t stride, double* out)
KINML_DECLARE_KERNEL(void, jacobian_transpose_product, const cpu::StoredJacobian<float>& jacobian,
                     const float* g, std::int64_t stride, float* out)

// v[i, d] = sum_{c < 3 n_atoms} J[i, d, c] r[c].
// r [3 n_atoms]; v [n_atoms, D] has rows `stride` numbers apart and must not overlap J or r.
KINML_DECLARE_KERNEL(void, jacobian_product, const cpu::StoredJacobian<double>& jacobian,
                     const double* r, double* v, std::int64_t stride)
KINML_DECLARE_KERNEL(void, jacobian_product, const cpu::StoredJacobian<float>& jacobian,
                     const float* r, float* v, std::int64_t stride)
}  // namespace kinml

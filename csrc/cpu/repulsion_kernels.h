// The products of aev_cpu.h for the repulsion of core/repulsion.h, which is of an atom one number.
// An environment's neighbours are found (aev_neighbours), its triples are not needed.
#pragma once

#include <cstdint>

#include "../core/repulsion.h"
#include "aev_kernels.h"
#include "dispatch.h"

namespace kinml {
#define KINML_DECLARE_REPULSION(T)                                                               \
  /* out[i] of the centres i; pairs [n_species, n_species] */                                    \
  KINML_DECLARE_KERNEL(void, repulsion_rows, const RepulsionPair<T>* pairs,                      \
                       const cpu::AevTables<T>&, const cpu::Environment<T>&, T* out)             \
  /* out[i] = the derivative along v [n_atoms, 3] */                                             \
  KINML_DECLARE_KERNEL(void, repulsion_tangent_rows, const RepulsionPair<T>* pairs,              \
                       const cpu::AevTables<T>&, const cpu::Environment<T>&, const T* v, T* out) \
  /* as aev_transposed, with g [n_atoms] */                                                      \
  KINML_DECLARE_KERNEL(void, repulsion_transposed, const RepulsionPair<T>* pairs,                \
                       const cpu::AevTables<T>&, const cpu::Environment<T>&, const T* g, T* out, \
                       T* virials)
KINML_DECLARE_REPULSION(double)
KINML_DECLARE_REPULSION(float)
#undef KINML_DECLARE_REPULSION
}  // namespace kinml

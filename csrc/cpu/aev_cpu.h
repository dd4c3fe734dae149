// Atomic environment vectors of ragged batches of structures on the CPU; formulas in
// core/aev_terms.h, order of the vector in core/aev_layout.h.
//
//   a_i        vector of atom i, [D]            aev_forward   coordinates -> a
//   J_i        da_i/dx, [D, 3 n]                aev_vjp       g -> sum_i J_i^T g_i
//   v          direction in coordinate space    aev_jvp       v -> J_i v
//                                               aev_hvp       g, v -> d/dx sum_i g_i . J_i v
//                                               aev_jacobian  J itself, for checks and storage
//
// First derivatives of both products are again among these, so a is differentiable twice:
//   d(J^T g) = hvp(g, dx) + J^T dg;   (d/dg)^T u = J u;   (d/dx)^T u = hvp(g, u)
//   d(J v) . w:  (d/dv)^T w = J^T w;  (d/dx)^T w = hvp(w, v)
//
// The system has coordinates; all of its structures are meant. Rows of ghosts are zero, as vectors
// and as results, and are not read of gradients.
//
// virials: of each centre i, sum over its pairs of d(g_i . a_i)/dd (x) d with the displacement d of
// the pair; row by derivative, column by displacement.
//
// Results have the same bits for any n_threads. Throws std::bad_alloc only.
#pragma once

#include <cstdint>

#include "../core/model.h"
#include "../core/system.h"

namespace kinml::cpu {

template <class T>
void aev_forward(const AevParameters& parameters, const System<T>& system, T* aev /*[n_atoms, D]*/,
                 int n_threads);
template <class T>
void aev_jvp(const AevParameters& parameters, const System<T>& system,
             const T* tangent /*[n_atoms, 3]*/, T* out /*[n_atoms, D]*/, int n_threads);
template <class T>
void aev_vjp(const AevParameters& parameters, const System<T>& system,
             const T* gradient /*[n_atoms, D]*/, T* out /*[n_atoms, 3]*/, int n_threads,
             T* virials = nullptr /*[n_atoms, 3, 3]*/);
template <class T>
void aev_hvp(const AevParameters& parameters, const System<T>& system,
             const T* gradient /*[n_atoms, D]*/, const T* tangent /*[n_atoms, 3]*/,
             T* out /*[n_atoms, 3]*/, int n_threads);
// Column 3 q + d of an atom's block is the derivative with respect to coordinate d of the q-th atom
// of its structure; columns >= 3 times the largest structure, the rest is zero.
template <class T>
void aev_jacobian(const AevParameters& parameters, const System<T>& system, std::int64_t columns,
                  T* out /*[n_atoms, D, columns]*/, int n_threads);

}  // namespace kinml::cpu

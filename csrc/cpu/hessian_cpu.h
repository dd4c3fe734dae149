// Second derivatives of energies by coordinates on the CPU, analytic.
//
// The energy of a centre depends on the displacements of its neighbours alone: what hessian_kernels.h
// gives of them is added to the rows and columns of their atoms, and subtracted from those of the
// centre. Centres are worked on by all threads and added in order: the same bits for any number.
//
// The product with one vector v does without them: with u = J v, and the derivatives along v
//   d eps_k = d eps_{k-1} + (p_k, c_k) . (u, d eps_{k-1})
//   (d p_k, d c_k) = f''_k (u, d eps_{k-1}),   d g_k = d p_k + d c_k g_{k-1} + (1 + c_k) d g_{k-1}
// of the levels' energies and gradients g_k (force_step_cpu.h), H v = J^T d g_k + (dJ/dv)^T g_k.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/model.h"
#include "../core/system.h"

namespace kinml::cpu {

inline constexpr std::int64_t kMostHessianLevels = 8, kMostHessianLayers = 16;

// atoms     // [n_rows] of the system, different ones, which have rows; or null: all
// hessians  // [M, R, n_rows, 3, columns] of the R levels from first_level on: the row of coordinate
//           // x of atom i has d2E/dx_i dx_j, eV / angstrom^2, for the 3 n coordinates of its
//           // structure; columns >= 3 n, the rest is 0, as are rows of structures not chosen
// The system has coordinates; a repulsion reaches no farther than the descriptor. At most
// kMostHessianLevels levels of kMostHessianLayers layers. Throws std::bad_alloc only.
template <class T>
void energy_hessians(const Model<T>& model, const System<T>& system, std::int64_t first_level,
                     const std::int64_t* atoms, std::int64_t n_rows, std::int64_t columns,
                     T* hessians, int n_threads);

// The derivative of the gradient of each level's energy along v.
//
// v         // [n_atoms, 3] displacements of the atoms
// products  // [M, R, n_atoms, 3] H v, eV / angstrom^2 times the unit of v; rows of structures that
//           // are not chosen stay as they are
// prepared  // as of energy_forces
// The system has coordinates. A structure is worked on by one thread, however large.
template <class T>
void hessian_products(const Model<T>& model, const System<T>& system, std::int64_t first_level,
                      const T* v, T* products, int n_threads, const std::byte* prepared = nullptr);

}  // namespace kinml::cpu

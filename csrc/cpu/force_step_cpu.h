// Energies, forces, and the gradient of any function of both with respect to the weights, on the
// CPU: coordinates (or stored Jacobians) in, no automatic differentiation.
//
// A batch is cut into tiles of a few whole molecules; one thread takes a tile from start to end,
// so that everything about it stays in the thread's cache:
//   a = AEV(x), E = sum_i f(a_i)            environments are computed once and kept for all
//   products g = grad f(a),  F = -J^T g e = dL/dE, r = dL/dF                    the caller's loss,
//   structure by structure v = -J r                                then dL/dw is the gradient of
//   sum_i e f(a_i) + grad f(a_i) . v_i tangents along v, one pass backwards    (forward over
//   reverse: exact, as cheap as two passes)
// Weight gradients are summed in parts that depend on the batch only and then added in order: the
// result has the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "aev_cpu.h"
#include "networks_cpu.h"

namespace kinml::cpu {

// A data set, and which of its structures are meant.
template <class T>
struct ForceBatch {
  const std::int64_t* species;     // [n_atoms]
  const std::int64_t* offsets;     // [n_structures + 1]
  const std::int64_t* structures;  // [count] indices, or null: structures 0 .. count - 1
  std::int64_t count;

  // Either the coordinates [n_atoms, 3] and what the AEV is made of ...
  const AevParameters* parameters = nullptr;
  const T* coordinates = nullptr;
  // ... or stored descriptors [n_atoms, length] and Jacobians [n_atoms, length, columns], of which
  // a structure of n atoms has the first 3 n columns.
  const T* features = nullptr;
  const T* jacobian = nullptr;
  std::int64_t length = 0;
  std::int64_t columns = 0;

  std::int64_t structure(std::int64_t i) const { return structures == nullptr ? i : structures[i]; }
};

// energies  // [count] sum over atoms of f and, unless null, sae [n_species], eV
// forces    // rows of the data set's atoms, [n_atoms, 3]; those of the batch are written
template <class T>
void energy_forces(const NetworkShape& shape, const T* weights, const ForceBatch<T>& batch,
                   const double* sae, double* energies, T* forces, int n_threads);

// gradient  // like the weights: that of sum e E + sum r F
// e         // [count] dL/dE
// r         // [n_atoms, 3] dL/dF, rows of the data set's atoms
template <class T>
void energy_forces_backward(const NetworkShape& shape, const T* weights, const ForceBatch<T>& batch,
                            const double* e, const T* r, T* gradient, int n_threads);

// Mean squared errors: L_E = sum_s w_s dE_s^2 / n_E, L_F = sum_s u_s (mean over 3 n_s components of
// dF^2) / n_F, where n_E and n_F count the structures of the batch whose weight is not 0.
struct ForceLoss {
  const double* energies;        // [n_structures] targets without single-atom energies
  const double* forces;          // [n_atoms, 3] targets; not read where the weight is 0
  const double* energy_weights;  // [n_structures] w
  const double* force_weights;   // [n_structures] u
  double energy_scale, force_scale;
};

// losses     // [2] L_E, L_F
// gradient   // like the weights: that of energy_scale L_E + force_scale L_F
// residuals  // [count] E - target
// errors     // [count, 3] sum |dF|, sum dF^2, max |dF| of a structure's components; 0 without
// weight
template <class T>
void force_step(const NetworkShape& shape, const T* weights, const ForceBatch<T>& batch,
                const ForceLoss& loss, double* losses, T* gradient, double* residuals,
                double* errors, int n_threads);

}  // namespace kinml::cpu

// Energies, forces and the gradient of a loss of both on the GPU: the entries of
// csrc/cpu/force_step_cpu.h, which has the formulas, on device memory.
//
// A block takes tiles of whole molecules, about kForceRows atoms, from coordinates to weight
// gradients; each warp of it has one atom's environment at a time. What a larger molecule keeps of
// its atoms is computed twice, in pieces of kForceRows atoms, so that no memory depends on sizes
// that only the device knows. Nothing is allocated and nothing waits; sums have a fixed order.
//
// Indices are not checked beforehand: a structure or a species that is not there gives NaN.
#pragma once

#include "../core/batches.h"
#include "network_plan.h"

namespace kinml::cuda {

// Device memory of ForceLoss of csrc/cpu/force_step_cpu.h.
struct ForceLoss {
  const double* energies;        // [K, n_structures]
  const double* forces;          // [K, n_atoms, 3]
  const double* energy_weights;  // [K, n_structures]
  const double* force_weights;   // [K, n_structures]
  const double* scales;          // [2] of energies, of forces
};

// Bytes of the workspace, of the evaluation of an ensemble or of a gradient.
template <class T>
std::int64_t energy_forces_workspace(const ChainPlan& plan, std::int64_t n_members,
                                     const ForceBatch<T>& batch);
template <class T>
std::int64_t force_step_workspace(const ChainPlan& plan, const ForceBatch<T>& batch);

// weights   // [n_members, plan.parameters]
// sae       // [n_members, R, n_species]; or null
// energies  // [n_members, R, count]
// forces    // [n_members, R, n_atoms, 3]; not touched without forces
template <class T>
void energy_forces(const ChainPlan& plan, const T* weights, std::int64_t n_members,
                   const ForceBatch<T>& batch, const double* sae, Levels levels, double* energies,
                   T* forces, char* workspace, Stream stream);

// e         // [R, count]
// r         // [R, n_atoms, 3]; not read without forces
// gradient  // [plan.parameters]
template <class T>
void energy_forces_backward(const ChainPlan& plan, const T* weights, const ForceBatch<T>& batch,
                            Levels levels, const double* e, const T* r, T* gradient,
                            char* workspace, Stream stream);

// losses     // [2]
// gradient   // [plan.parameters]
// residuals  // [K, count]
// errors     // [K, count, 3]
template <class T>
void force_step(const ChainPlan& plan, const T* weights, const ForceBatch<T>& batch,
                const ForceLoss& loss, double* losses, T* gradient, double* residuals,
                double* errors, char* workspace, Stream stream);

}  // namespace kinml::cuda

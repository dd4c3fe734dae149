// Energies, forces and the gradient of a loss of both on the GPU: the entries of
// csrc/cpu/force_step_cpu.h, which has the formulas, on device memory.
//
// A block takes tiles of whole molecules, about 32 atoms, from coordinates to weight
// gradients; each warp of it has one atom's environment at a time. What a larger molecule keeps of
// its atoms is computed twice, in pieces of 32 atoms, so that no memory depends on sizes
// that only the device knows. The energies and forces of large structures are computed by all
// blocks together, one pass after the other (large_structures.h). Nothing is allocated and nothing
// waits; sums have a fixed order.
//
// Indices are not checked beforehand: a structure or a species that does not exist gives NaN.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/loss.h"
#include "../core/model.h"
#include "../core/outputs.h"
#include "../core/system.h"
#include "launch.h"

namespace kinml::cuda {

// Bytes of the workspace, of the evaluation or of a gradient; it is aligned to 16 bytes.
template <class T>
std::int64_t energy_forces_workspace(const Model<T>& model, const System<T>& system);
template <class T>
std::int64_t force_step_workspace(const Model<T>& model, const System<T>& system);

// Outputs have the R = K - first_level levels from first_level on.
template <class T>
void energy_forces(const Model<T>& model, const System<T>& system, std::int64_t first_level,
                   const Outputs<T>& outputs, char* workspace, Stream stream);

// e         // [R, count]
// r         // [R, n_atoms, 3]; not read without forces
// w         // [R, count, 3, 3], or null
// gradient  // like the weights
template <class T>
void energy_forces_backward(const Model<T>& model, const System<T>& system,
                            std::int64_t first_level, const double* e, const T* r, const double* w,
                            T* gradient, char* workspace, Stream stream);

// losses     // [2], with stresses in the loss [3]
// gradient   // like the weights
// residuals  // [K, count]
// errors     // [K, count, 3], with stresses [K, count, 6]
template <class T>
void force_step(const Model<T>& model, const System<T>& system, const Loss& loss, double* losses,
                T* gradient, double* residuals, double* errors, char* workspace, Stream stream);

// The same for a batch that n_ranks processes share, see csrc/cpu/force_step_cpu.h. The parts of a
// batch are those of the blocks, which depend on its number of structures alone.
template <class T>
std::int64_t message_bytes(const System<T>& system, const Loss& loss, std::int64_t n_weights,
                           std::int64_t n_ranks);
template <class T>
std::int64_t force_step_share_workspace(const Model<T>& model, const System<T>& system,
                                        std::int64_t rank, std::int64_t n_ranks);
template <class T>
void force_step_share(const Model<T>& model, const System<T>& system, const Loss& loss,
                      std::int64_t rank, std::int64_t n_ranks, std::byte* message, char* workspace,
                      Stream stream);
template <class T>
void force_step_join(const System<T>& system, const Loss& loss, const std::byte* messages,
                     std::int64_t n_ranks, std::int64_t n_weights, double* losses, T* gradient,
                     double* residuals, double* errors, Stream stream);

}  // namespace kinml::cuda

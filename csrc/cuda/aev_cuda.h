// Atomic environment vectors of ragged batches of molecules on the GPU: the entries of
// csrc/cpu/aev_cpu.h on device memory, one warp for one centre (aev_group.h).
//
//   aev_forward, aev_jvp, aev_jacobian   warps go over the centres
//   aev_vjp, aev_hvp                     a block goes over the centres of a structure, its warps
//     taking some at a time whose products are then added one after the other; or, if structures
//     are large, the products of all centres are kept and each atom sums those that it belongs to
//
// Nothing is allocated and nothing waits; sums have a fixed order. Indices are not checked
// beforehand: an atom whose species is not there, or with more neighbours within the longer cutoff
// than kMostNeighbours (kept products: kMostKept), gives NaN in all that depends on it.
//
// Large structures have cells, if the caller sorts atoms by them:
//   1. aev_cell_keys   coordinates -> keys
//   2. the caller sorts keys (stable) and passes them with the atoms in their order as AevCells
// Without cells every atom of a structure is tried as a neighbour of every other one.
#pragma once

#include <cstdint>

#include "../core/batches.h"
#include "launch.h"

namespace kinml::cuda {

inline constexpr int kMostNeighbours = 1024;
inline constexpr int kMostKept = 256;

enum class AevProduct { forward, jvp, vjp, hvp, jacobian };

struct AevCells {
  const std::int64_t* keys = nullptr;   // [n_atoms] in ascending order
  const std::int64_t* atoms = nullptr;  // [n_atoms] in the order of the keys
};

// Whether structures are so large that cells pay.
inline bool aev_structures_are_large(std::int64_t n_structures, std::int64_t n_atoms) {
  return n_atoms > 200 * n_structures;
}

// keys  // [n_atoms] of the cell of each atom, in structures and cells of no order. There may be
//          2^21 structures.
template <class T>
void aev_cell_keys(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
                   std::int64_t* keys, Stream stream);

// Bytes of the workspace of a product, which is aligned to 16 bytes.
template <class T>
std::int64_t aev_workspace(const AevParameters& parameters, AevProduct product,
                           std::int64_t n_structures, std::int64_t n_atoms);

// The number of atoms, n_atoms, is offsets[n_structures]. Throws Error if the parameters have
// longer lists than kMaxShifts, or if a kernel cannot be started.
template <class T>
void aev_forward(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
                 const AevCells& cells, T* aev /*[n_atoms, D]*/, char* workspace, Stream stream);
template <class T>
void aev_jvp(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
             const AevCells& cells, const T* tangent /*[n_atoms, 3]*/, T* out /*[n_atoms, D]*/,
             char* workspace, Stream stream);
template <class T>
void aev_vjp(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
             const AevCells& cells, const T* gradient /*[n_atoms, D]*/, T* out /*[n_atoms, 3]*/,
             char* workspace, Stream stream);
template <class T>
void aev_hvp(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
             const AevCells& cells, const T* gradient /*[n_atoms, D]*/,
             const T* tangent /*[n_atoms, 3]*/, T* out /*[n_atoms, 3]*/, char* workspace,
             Stream stream);
// Column 3 q + d of an atom's block is the derivative with respect to coordinate d of the q-th atom
// of its structure; columns >= 3 times the largest structure, the rest is zero.
template <class T>
void aev_jacobian(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
                  const AevCells& cells, std::int64_t columns, T* out /*[n_atoms, D, columns]*/,
                  char* workspace, Stream stream);

}  // namespace kinml::cuda

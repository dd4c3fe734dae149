// Atomic environment vectors of ragged batches of molecules on the GPU: the entries of
// csrc/cpu/aev_cpu.h on device memory, one warp for one centre (aev_group.h).
//
//   aev_forward, aev_jvp, aev_jacobian   warps go over the centres
//   aev_vjp, aev_hvp                     a block goes over the centres of a structure, its warps
//     taking some at a time whose products are then added one after the other; or, if structures
//     are large, the products of all centres are kept and each atom sums those that it belongs to
//
// Nothing is allocated and nothing waits; sums have a fixed order. Indices are not checked
// beforehand: an atom whose species does not exist gives NaN in all that depends on it.
//
// Every warp has a list of up to kMostNeighbours. An atom with more of them within the longer cutoff
// is a crowd: its kernel leaves a mark and is launched again, in so many blocks as there is memory
// for lists of all atoms, for what is marked. Products are kept of kLeastKept neighbours or, as far
// as memory goes, more; a structure with a centre that has more than that is a crowd as well. Only
// more than kMostOfCrowd neighbours, up to which the triples can be counted, give NaN.
//
// The system has coordinates; all of its structures are meant. Atoms of large structures are sorted
// by cells; in others, and with periodicity, every atom of a structure is tried as a neighbour of
// every other one, with as many images as can be near.
#pragma once

#include <cstdint>

#include "../core/model.h"
#include "../core/system.h"
#include "cells.h"
#include "images.h"
#include "launch.h"

namespace kinml::cuda {

inline constexpr int kMostNeighbours = 1024;
inline constexpr int kLeastKept = 256;
inline constexpr int kMostOfCrowd = 32768;

enum class AevProduct { forward, jvp, vjp, hvp, jacobian };

// Whether structures are so large that cells pay.
inline bool aev_structures_are_large(std::int64_t n_structures, std::int64_t n_atoms) {
  return n_atoms > 200 * n_structures;
}

// The cells of its structures, whose images are looked for; [n_structures].
template <class T>
void prepare_images(const AevParameters& parameters, const System<T>& system, ImageCell* cells,
                    Stream stream);

// Sums of the virials of centres over the chosen structures, n times.
template <class T>
void sum_virials(const System<T>& system, std::int64_t n, const T* atomic /*[n, n_atoms, 3, 3]*/,
                 double* sums /*[n, count, 3, 3]*/, Stream stream);

// The cells of a system, in memory of aev_cells_bytes(n_atoms) aligned to 16 bytes. There may be
// 2^21 structures.
std::int64_t aev_cells_bytes(std::int64_t n_atoms);
template <class T>
Cells aev_cells(const AevParameters& parameters, const System<T>& system, char* memory,
                Stream stream);

// Bytes of the workspace of a product, which is aligned to 16 bytes.
template <class T>
std::int64_t aev_workspace(const AevParameters& parameters, AevProduct product,
                           const System<T>& system);

// Throws Error if the parameters have longer lists than kMaxShifts, or if a kernel cannot be
// started.
//
// cells  // of the system, for callers of several products; null: found here for large structures
template <class T>
void aev_forward(const AevParameters& parameters, const System<T>& system, T* aev /*[n_atoms, D]*/,
                 char* workspace, Stream stream, const Cells* cells = nullptr);
template <class T>
void aev_jvp(const AevParameters& parameters, const System<T>& system,
             const T* tangent /*[n_atoms, 3]*/, T* out /*[n_atoms, D]*/, char* workspace,
             Stream stream, const Cells* cells = nullptr);
template <class T>
void aev_vjp(const AevParameters& parameters, const System<T>& system,
             const T* gradient /*[n_atoms, D]*/, T* out /*[n_atoms, 3]*/, char* workspace,
             Stream stream, const Cells* cells = nullptr, T* virials = nullptr /*[n_atoms, 3, 3]*/);
template <class T>
void aev_hvp(const AevParameters& parameters, const System<T>& system,
             const T* gradient /*[n_atoms, D]*/, const T* tangent /*[n_atoms, 3]*/,
             T* out /*[n_atoms, 3]*/, char* workspace, Stream stream, const Cells* cells = nullptr);
// Column 3 q + d of an atom's block is the derivative with respect to coordinate d of the q-th atom
// of its structure; columns >= 3 times the largest structure, the rest is zero.
template <class T>
void aev_jacobian(const AevParameters& parameters, const System<T>& system, std::int64_t columns,
                  T* out /*[n_atoms, D, columns]*/, char* workspace, Stream stream,
                  const Cells* cells = nullptr);

}  // namespace kinml::cuda

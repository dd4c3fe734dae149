// Per-species networks on the GPU: the entries of csrc/cpu/networks_cpu.h on device memory, for one
// network of each species. Nothing is allocated and nothing waits.
//
// A block takes a tile of kNetworkRows atoms of one species through all layers. Values of indices
// are not checked beforehand: a row or an owner that does not exist gives NaN.
#pragma once

#include "network_plan.h"

namespace kinml::cuda {

inline constexpr int kNetworkRows = 32;
inline constexpr int kNetworkBlocks = 256;  // at most: their weight gradients are summed in order

// Rows [first, first + count) of a species; count = 0 behind the last tile.
struct NetworkTileSpan {
  int species;
  std::int64_t first;
  int count;
};
// starts  // [n_species + 1]
KINML_HD NetworkTileSpan network_tile(const std::int64_t* starts, int n_species,
                                      std::int64_t tile) {
  for (int s = 0; s < n_species; ++s) {
    const std::int64_t atoms = starts[s + 1] - starts[s];
    const std::int64_t tiles = (atoms + kNetworkRows - 1) / kNetworkRows;
    if (tile < tiles) {
      const std::int64_t first = tile * kNetworkRows, left = atoms - first;
      return {s, starts[s] + first, static_cast<int>(left < kNetworkRows ? left : kNetworkRows)};
    }
    tile -= tiles;
  }
  return {0, 0, 0};
}
// At least as many tiles as there are, from what the host knows.
inline std::int64_t most_network_tiles(std::int64_t n_atoms, int n_species) {
  return n_atoms / kNetworkRows + n_species;
}

// parameters  // [n_members, plan.parameters]
// packed      // [n_members, plan.packed]
// cleared     // a number that becomes 0 as well, or null
template <class T>
void pack_networks(const ChainPlan& plan, const T* parameters, std::int64_t n_members, T* packed,
                   Stream stream, int* cleared = nullptr);

// What a pass over a batch reads; n atoms in species order.
template <class T>
struct NetworkBatch {
  const T* packed;    // [plan.packed]
  const T* features;  // [n_features, stride]
  std::int64_t stride, n_features;
  const std::int64_t* rows;    // [n]
  const std::int64_t* owners;  // [n]
  const std::int64_t* starts;  // [n_species + 1]
  std::int64_t n, n_structures;
};
// Bytes of the workspace of each of the passes; `gradients` of the parameters.
template <class T>
std::int64_t networks_workspace(const ChainPlan& plan, std::int64_t n, bool second, bool gradients);

// What the forward pass keeps for the backward pass: [n, stride], columns [0, plan.hidden) h and
// [stride / 2, stride / 2 + plan.hidden) f'(z) of all layers.
template <class T>
struct SavedLayers {
  T* numbers;
  std::int64_t stride;
};
// Where a backward pass writes; null: not wanted.
template <class T>
struct NetworkGradients {
  T* derivatives = nullptr;  // [n] by the gradients of the energies; of the second pass
  T* atoms = nullptr;        // [n, D] by the features of the i-th atom
  T* parameters = nullptr;   // [plan.parameters], overwritten
};

// saved   // or null
// atomic  // [n] network outputs, in species order
template <class T>
void networks_forward(const ChainPlan& plan, const NetworkBatch<T>& batch,
                      const SavedLayers<T>& saved, T* atomic, char* workspace, Stream stream);
// grad_energies    // [n_structures]
template <class T>
void networks_backward(const ChainPlan& plan, const NetworkBatch<T>& batch,
                       const SavedLayers<T>& saved, const double* grad_energies,
                       const NetworkGradients<T>& gradients, char* workspace, Stream stream);
// Derivatives of S = sum_i t_i grad f(a_i) . v_i, t_i = grad_energies[owner].
// tangents  // [n_features, D]
template <class T>
void networks_second_backward(const ChainPlan& plan, const NetworkBatch<T>& batch,
                              const T* tangents, const double* grad_energies,
                              const NetworkGradients<T>& gradients, char* workspace, Stream stream);

// The atoms of each structure: order[i], i in [firsts[s], firsts[s + 1]), in species order.
struct StructureAtoms {
  const std::int64_t* order;   // [n]
  const std::int64_t* firsts;  // [n_structures + 1]
  std::int64_t n_structures;
};
// sums[s] = sum over the atoms of structure s of their values and their species' shift
// values  // [n] in species order
// starts  // [n_species + 1]
// shifts  // [n_species] float64, or null
template <class T>
void sum_by_structure(const T* values, const StructureAtoms& atoms, const std::int64_t* starts,
                      int n_species, const double* shifts, double* sums, Stream stream);

// sums[i] = sum over parts, in order, of parts[part][i]
template <class T>
void sum_parts(const T* parts, std::int64_t n_parts, std::int64_t n, T* sums, Stream stream);

}  // namespace kinml::cuda

// What the host code hands to the AEV kernels of one instruction set (plain data, no instruction
// set).
//
// Centres are worked on in two stages. First their environments are computed once: neighbours
// (aev_neighbours), then triples with their factors (aev_triples). The passes then read them, as
// often as needed and in any order:
//   aev_rows          a_i
//   aev_transposed    sum_i J_i^T g_i          (of a dual environment: its derivative along v)
//   aev_tangent_rows  J_i v
//   aev_transposed_many  aev_transposed for several g
// The caller owns all memory.
#pragma once

#include <cstdint>

#include "../core/aev_numbers.h"
#include "dispatch.h"

namespace kinml::cpu {

// The longest register of any instruction set, in numbers of the smallest type: tables and scratch
// rows are padded to a multiple of it.
inline constexpr int kMaxLanes = 16;

// Centres whose sums over triples are in memory at one time.
inline constexpr std::int64_t kCentresAtOnce = 4;

constexpr std::int64_t padded(std::int64_t n, std::int64_t lanes = kMaxLanes) {
  return (n + lanes - 1) / lanes * lanes;
}

template <class T>
struct AevTables : AevNumbers<T> {
  T angular_step;           // distance of the angular shifts if that is even, else 0
  T angular_shrink;         // exp(-2 eta step^2)
  const T* radial_shifts;   // [n_radial], padded with the last one
  const T* angular_shifts;  // [n_angular], padded
  const T* section_cos;     // [n_sections] cos(alpha_m), padded
  const T* section_sin;     // [n_sections] sin(alpha_m), padded
};

// One structure, and where the neighbours of its atoms come from: its places, sorted into cells at
// least as wide as the longer cutoff, or pairs that were given. Places are those of the atoms or,
// with periodicity, of the atoms within the cell and of their images (images.h).
template <class T>
struct StructureView {
  std::int64_t n_atoms;
  const T* coordinates;         // [n_atoms, 3]
  const std::int64_t* species;  // [n_atoms]

  const double* places;             // [n_places, 3], or null: those of the atoms
  const std::int32_t* place_atoms;  // [n_places] with places: the atom of each
  const std::int32_t* cell_starts;  // [nx * ny * nz + 1]
  const std::int32_t* cell_places;  // [n_places] places in cell order
  const std::int32_t* place_cell;   // [n_places]
  int nx, ny, nz;

  const std::int64_t* pair_starts;  // [n_atoms + 1] where given pairs begin, or null
  const std::int64_t* neighbours;  // of the data set, whose atom `first_atom` is the first one here
  const std::int64_t* shifts;      // [.., 3] cells of the data set's pairs, or null
  const double* cell;              // [3, 3], read with shifts
  std::int64_t first_atom;

  std::int64_t max_candidates;  // places in any 27 neighbouring cells, or given pairs of an atom
};

// Neighbours and triples of the centres [begin, end) of a structure. The cells of the structure are
// read by aev_neighbours only.
template <class T>
struct Environment {
  StructureView<T> structure;
  std::int64_t begin, end;
  const T* direction;  // [n_atoms, 3] of the derivative in a dual environment, or null
  T* pairs;            // aligned to 64 bytes, pair_memory() numbers
  T* triples;          // aligned, triple_numbers

  // Set by aev_neighbours.
  std::int64_t n_pairs;
  std::int64_t triple_numbers;
  std::int64_t n_triples;
  std::int64_t triple_lanes;  // the same with those that stay free: each species pair of a
                              // centre begins a register
  std::int64_t most_near;     // neighbours of one centre within the angular cutoff
  const std::int32_t* index;  // [n_pairs] atom at the other end, centre after centre

  int planes() const { return direction == nullptr ? 1 : 2; }
  std::int64_t n_centres() const { return end - begin; }
  std::int64_t pair_room() const {
    return padded(n_centres() * structure.max_candidates + 2 * kMaxLanes);
  }
};

// Sizes in numbers of T, upper bounds over instruction sets. scratch_memory is known once
// aev_neighbours has counted.
template <class T>
std::int64_t pair_memory(const AevTables<T>& tables, const Environment<T>& environment) {
  const std::int64_t room = environment.pair_room();
  const std::int64_t segments = environment.n_centres() * tables.n_species;
  return environment.planes() * (9 + padded(tables.n_radial)) * room +
         3 * padded(environment.structure.max_candidates + room) + 2 * padded(segments + 1) +
         padded(2 * tables.n_species + 1);
}
template <class T>
std::int64_t scratch_memory(const AevTables<T>&, const Environment<T>& environment) {
  const std::int64_t triples = padded(environment.triple_lanes + kMaxLanes);
  const std::int64_t near = padded(environment.most_near + 3 * kMaxLanes);
  const std::int64_t pairs = environment.pair_room();
  return environment.planes() * (3 * triples + 3 * (kCentresAtOnce * near * near + kMaxLanes) +
                                 4 * kCentresAtOnce * near + 5 * near + pairs) +
         4 * pairs;
}

// The same for aev_transposed_many, which takes up to 2 registers of g at a time.
template <class T>
std::int64_t many_scratch_memory(const AevTables<T>& tables, const Environment<T>& environment) {
  const std::int64_t lanes = 2 * kMaxLanes, atoms = environment.structure.n_atoms;
  const std::int64_t near = environment.most_near;
  const std::int64_t length = padded(tables.layout().length());
  return length * (1 + lanes) + (3 * atoms + 9) * lanes + 5 * near * lanes + padded(4 * near) +
         padded(environment.structure.max_candidates * padded(tables.n_radial)) +
         (2 * tables.n_sections + tables.n_angular) * kMaxLanes;
}

}  // namespace kinml::cpu

namespace kinml {
// Finds and counts the neighbours of an environment whose `pairs` are allocated.
#define KINML_DECLARE_AEV(T)                                                                          \
  KINML_DECLARE_KERNEL(void, aev_neighbours, const cpu::AevTables<T>&, cpu::Environment<T>&)          \
  KINML_DECLARE_KERNEL(void, aev_triples, const cpu::AevTables<T>&, const cpu::Environment<T>&,       \
                       T* scratch)                                                                    \
  /* out[i, :] = a_i for the centres i; rows of D numbers, `stride` apart, that of atom 0 first */    \
  KINML_DECLARE_KERNEL(void, aev_rows, const cpu::AevTables<T>&, const cpu::Environment<T>&,          \
                       T* out, std::int64_t stride)                                                   \
  /* out[i, :] = J_i v, v [n_atoms, 3]; with strain [3, 3] the displacement d of a pair moves by */   \
  /* strain . d besides; or null */                                                                   \
  KINML_DECLARE_KERNEL(void, aev_tangent_rows, const cpu::AevTables<T>&,                              \
                       const cpu::Environment<T>&, const T* v, const T* strain, T* out,               \
                       std::int64_t stride, T* scratch)                                               \
  /* out [n_atoms, 3] += sum over the centres of J_i^T g_i, or its derivative; virials[i, :] = sum */ \
  /* over the pairs of the centre i of dg.a/dd (x) d, [3, 3], d the displacement; or null */          \
  KINML_DECLARE_KERNEL(void, aev_transposed, const cpu::AevTables<T>&, const cpu::Environment<T>&,    \
                       const T* g, std::int64_t stride, T* out, T* virials, T* scratch)               \
  /* the same for g[i], out[i] and virials[i] (or null), i < count, of an environment that is not */  \
  /* dual, with many_scratch_memory: what comes out of a g depends on count, not on i or others */    \
  KINML_DECLARE_KERNEL(void, aev_transposed_many, const cpu::AevTables<T>&,                           \
                       const cpu::Environment<T>&, const T* const* g, std::int64_t count,             \
                       std::int64_t stride, T* const* out, T* const* virials, T* scratch)
KINML_DECLARE_AEV(double)
KINML_DECLARE_AEV(float)
#undef KINML_DECLARE_AEV
}  // namespace kinml

// What aev_cpu.cpp hands to the kernels of one instruction set (plain data, no instruction set).
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace kinml::cpu {

// The longest register of any instruction set, in numbers of the smallest type: tables and scratch
// rows are padded to a multiple of it.
inline constexpr int kMaxLanes = 16;
// Triples worked on at a time: their factors stay in the first-level cache.
inline constexpr int kChunk = 64;

constexpr std::int64_t padded(std::int64_t n, std::int64_t lanes = kMaxLanes) {
  return (n + lanes - 1) / lanes * lanes;
}

template <class T>
struct AevTables {
  int n_species, n_radial, n_angular, n_sections;
  T radial_eta, radial_cutoff, radial_factor;
  T angular_eta, angular_cutoff, angular_factor;
  T beta;
  T zeta;
  int integer_zeta;         // zeta when it is a whole number >= 1, else -1
  const T* radial_shifts;   // [n_radial], padded with the last one
  const T* angular_shifts;  // [n_angular], padded
  const T* section_cos;     // [n_sections] cos(alpha_m), padded
  const T* section_sin;     // [n_sections] sin(alpha_m), padded
};

// One structure, with its atoms sorted into cells at least as wide as the longer cutoff.
template <class T>
struct StructureView {
  std::int64_t n_atoms;
  const T* coordinates;             // [n_atoms, 3]
  const std::int64_t* species;      // [n_atoms]
  const T* tangent;                 // [n_atoms, 3] direction of differentiation, or null
  const std::int32_t* cell_starts;  // [nx * ny * nz + 1]
  const std::int32_t* cell_atoms;   // [n_atoms] atoms in cell order
  const std::int32_t* atom_cell;    // [n_atoms]
  int nx, ny, nz;
  std::int64_t max_candidates;  // atoms in any 27 neighbouring cells
};

enum class AevMode {
  forward,  // out[i] = a_i
  jvp,      // out[i] = J_i v
  vjp,      // out += sum_i J_i^T g_i
  hvp,      // out += d/dx sum_i g_i . J_i v
  jacobian  // out[i] = J_i
};

// Centres [begin, end) of a structure.
template <class T>
struct AevTask {
  AevMode mode;
  std::int64_t begin, end;
  const T* gradient;     // [n_atoms, D] for vjp and hvp
  T* out;                // forward, jvp: [n_atoms, D]; vjp, hvp: [n_atoms, 3]; jacobian below
  std::int64_t columns;  // jacobian: out is [n_atoms, D, columns], columns >= 3 n_atoms
  T* workspace;          // aligned to 64 bytes, aev_workspace() numbers
};

// Scratch numbers that the kernels need; an upper bound over instruction sets and modes.
template <class T>
std::int64_t aev_workspace(const AevTables<T>& tables, std::int64_t max_candidates);

}  // namespace kinml::cpu

namespace kinml {
KINML_DECLARE_KERNEL(void, aev_centres, const cpu::AevTables<double>&,
                     const cpu::StructureView<double>&, const cpu::AevTask<double>&)
KINML_DECLARE_KERNEL(void, aev_centres, const cpu::AevTables<float>&,
                     const cpu::StructureView<float>&, const cpu::AevTask<float>&)
}  // namespace kinml

// What the ops on the CPU share: threads, and checks of the values of indices.
#pragma once

#include <ATen/Parallel.h>

#include <array>
#include <cmath>

#include "../core/lattice.h"
#include "arguments.h"

namespace kinml::ops {

inline int threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// The cell of a structure, its number of centres and the pairs that were given.
inline void check_surroundings_values(const System<double>& view, int64_t s) {
  if (view.centres != nullptr)
    TORCH_CHECK(view.centres[s] >= 0 && view.centres[s] <= view.atoms(s), "kinml_fast: centres[", s,
                "] = ", view.centres[s], " is not in [0, ", view.atoms(s),
                "], the atoms of the structure");
  if (view.is_periodic(s)) {
    const int64_t* const along = view.periodic + 3 * s;
    for (int64_t x = 0; x < 9; ++x)
      TORCH_CHECK(along[x / 3] == 0 || std::isfinite(view.cells[9 * s + x]),
                  "kinml_fast: the cell of structure ", s, " has a number that is not finite");
    const Lattice lattice(view.cells + 9 * s, along);
    // With a comparison that NaN fails: vectors of no length, or parallel ones.
    TORCH_CHECK(std::abs(lattice.volume) > 0, "kinml_fast: the cell of structure ", s,
                " has no volume: its periodic vectors are zero or lie in a line or plane");
    TORCH_CHECK(lattice.volume > 0, "kinml_fast: the cell of structure ", s,
                " is left-handed (its volume is ", lattice.volume,
                " angstrom^3): swap two of its vectors");
    for (int k = 0; k < 3; ++k)
      TORCH_CHECK(!lattice.periodic[k] || lattice.heights[k] >= kLowestCell,
                  "kinml_fast: the cell of structure ", s, " is only ", lattice.heights[k],
                  " angstrom high along vector ", k, ", less than ", kLowestCell);
  }
  if (view.pair_starts == nullptr) return;
  const int64_t begin = view.offsets[s], end = view.offsets[s + 1];
  for (int64_t i = begin; i < begin + view.rows(s); ++i)
    for (int64_t p = view.pair_starts[i]; p < view.pair_starts[i + 1]; ++p) {
      const int64_t j = view.neighbours[p];
      TORCH_CHECK(j >= begin && j < end, "kinml_fast: neighbours[", p, "] = ", j,
                  " is not an atom of structure ", s, ", whose are ", begin, " to ", end - 1);
      const int64_t* const n = view.shifts == nullptr ? nullptr : view.shifts + 3 * p;
      TORCH_CHECK(i != j || (n != nullptr && view.is_periodic(s) && (n[0] || n[1] || n[2])),
                  "kinml_fast: pair ", p, " is of atom ", i, " with itself, in the same cell");
      for (int k = 0; n != nullptr && k < 3; ++k)
        TORCH_CHECK(n[k] == 0 || (view.is_periodic(s) && view.periodic[3 * s + k]),
                    "kinml_fast: shifts[", p, "] is along vector ", k, ", but structure ", s,
                    " is not periodic along it");
    }
}
inline void check_surroundings_values(const SystemArguments& system) {
  if (!system.cells.defined() && !system.centres.defined() && !system.neighbours.defined()) return;
  // Only what has the same type whatever that of the coordinates is.
  System<double> view;
  view.offsets = system.offsets.const_data_ptr<int64_t>();
  if (system.cells.defined()) {
    view.cells = system.cells.const_data_ptr<double>();
    view.periodic = system.periodic.const_data_ptr<int64_t>();
  }
  if (system.centres.defined()) view.centres = system.centres.const_data_ptr<int64_t>();
  if (system.neighbours.defined()) {
    view.pair_starts = system.pair_starts.const_data_ptr<int64_t>();
    view.neighbours = system.neighbours.const_data_ptr<int64_t>();
    if (system.shifts.defined()) view.shifts = system.shifts.const_data_ptr<int64_t>();
    const int64_t n_pairs = system.neighbours.size(0);
    int64_t before = 0;
    for (int64_t i = 0; i <= system.n_atoms(); ++i) {
      TORCH_CHECK(view.pair_starts[i] >= before && view.pair_starts[i] <= n_pairs,
                  "kinml_fast: pair_starts[", i, "] = ", view.pair_starts[i],
                  ", but they must not decrease and lie within the ", n_pairs, " neighbours");
      before = view.pair_starts[i];
    }
  }
  for (int64_t i = 0; i < system.count(); ++i)
    check_surroundings_values(
        view, system.structures.defined() ? system.structures.const_data_ptr<int64_t>()[i] : i);
}

// Structures with a stress in the loss have one.
inline void check_stress_weights(const SystemArguments& system, const Loss& loss) {
  if (!loss.with_stresses()) return;
  const System<double> view{.cells = system.cells.const_data_ptr<double>(),
                            .periodic = system.periodic.const_data_ptr<int64_t>()};
  for (int64_t i = 0; i < system.count(); ++i) {
    const int64_t s =
        system.structures.defined() ? system.structures.const_data_ptr<int64_t>()[i] : i;
    for (int64_t k = 0; k < loss.n_levels; ++k)
      TORCH_CHECK(loss.stress_weight(k, s) == 0 ||
                      (view.is_periodic(s) && cell_volume(view.cells + 9 * s) > 0),
                  "kinml_fast: structure ", s, " has a weight in the loss of stresses, but ",
                  view.is_periodic(s) ? "its cell has no volume" : "is not periodic");
  }
}

// Offsets and species of the chosen structures of a system: increasing from 0 to n_atoms, within
// the list of species, with enough columns of the Jacobian.
inline void check_system_values(const SystemArguments& system, int64_t n_species) {
  const int64_t n_atoms = system.n_atoms(), n_structures = system.n_structures();
  const int64_t* const z = system.species.const_data_ptr<int64_t>();
  const int64_t* const o = system.offsets.const_data_ptr<int64_t>();
  const int64_t* chosen = nullptr;
  if (system.structures.defined()) {
    // Only these are looked at: a data set may be a thousand times as large.
    chosen = system.structures.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < system.count(); ++i) {
      const int64_t s = chosen[i];
      TORCH_CHECK(s >= 0 && s < n_structures, "kinml_fast: structures[", i, "] = ", s,
                  " is not in [0, ", n_structures, ")");
      TORCH_CHECK(o[s] >= 0 && o[s] <= o[s + 1] && o[s + 1] <= n_atoms, "kinml_fast: offsets[", s,
                  "] = ", o[s], " and the next, ", o[s + 1], ", must increase and lie within the ",
                  n_atoms, " atoms");
      for (int64_t a = o[s]; a < o[s + 1]; ++a)
        TORCH_CHECK(z[a] >= 0 && z[a] < n_species, "kinml_fast: species[", a, "] = ", z[a],
                    " is not in [0, ", n_species, ")");
    }
  } else {
    check_batch_values(z, o, n_atoms, n_structures, n_species);
  }
  check_surroundings_values(system);
  if (!system.jacobian.defined()) return;
  for (int64_t i = 0; i < system.count(); ++i) {
    const int64_t s = chosen == nullptr ? i : chosen[i];
    TORCH_CHECK(3 * (o[s + 1] - o[s]) <= system.jacobian.size(2), "kinml_fast: structure ", s,
                " has ", o[s + 1] - o[s], " atoms, but the Jacobian has columns for ",
                system.jacobian.size(2) / 3);
  }
}

}  // namespace kinml::ops

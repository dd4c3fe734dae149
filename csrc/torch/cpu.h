// What the ops on the CPU share: threads, and checks of the values of indices.
#pragma once

#include <ATen/Parallel.h>

#include "arguments.h"

namespace kinml::ops {

inline int threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
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
  if (!system.jacobian.defined()) return;
  for (int64_t i = 0; i < system.count(); ++i) {
    const int64_t s = chosen == nullptr ? i : chosen[i];
    TORCH_CHECK(3 * (o[s + 1] - o[s]) <= system.jacobian.size(2), "kinml_fast: structure ", s,
                " has ", o[s + 1] - o[s], " atoms, but the Jacobian has columns for ",
                system.jacobian.size(2) / 3);
  }
}

}  // namespace kinml::ops

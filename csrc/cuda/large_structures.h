// Energies and forces of large structures on the GPU: all blocks work on one pass after the other,
// each over all atoms of the batch: descriptors; per member and level the networks, atoms sorted by
// species, and forces.
#pragma once

#include <cstdint>

#include "../core/model.h"
#include "../core/outputs.h"
#include "../core/system.h"
#include "launch.h"
#include "network_plan.h"

namespace kinml::cuda {

// Whether that is faster than a structure for each block.
template <class T>
bool structures_are_large(const System<T>& system) {
  return !system.stored() && system.chosen == nullptr && system.n_atoms > 256 * system.n_structures;
}

// Bytes of the workspace, which is aligned to 16 bytes.
template <class T>
std::int64_t large_structures_workspace(const ChainPlan& plan, const Model<T>& model,
                                        const System<T>& system);

// As energy_forces (force_step_cuda.h).
template <class T>
void large_energy_forces(const ChainPlan& plan, const Model<T>& model, const System<T>& system,
                         std::int64_t first_level, const Outputs<T>& outputs, char* workspace,
                         Stream stream);

}  // namespace kinml::cuda

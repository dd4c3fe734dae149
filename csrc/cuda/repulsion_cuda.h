// The repulsion of atoms beside what their networks give, on the GPU.
#pragma once

#include <cstdint>

#include "../core/model.h"
#include "../core/outputs.h"
#include "../core/system.h"
#include "launch.h"

namespace kinml::cuda {

// Bytes of the workspace, which is aligned to 16 bytes.
template <class T>
std::int64_t repulsion_workspace(const AevParameters& parameters, const System<T>& system);

// Adds that of the parameters to the outputs, but for virials, which are sums; the same to all of
// their rows, one for each member and level.
template <class T>
void add_repulsion(const AevParameters& parameters, const System<T>& system, std::int64_t n_rows,
                   const Outputs<T>& outputs, char* workspace, Stream stream);

}  // namespace kinml::cuda

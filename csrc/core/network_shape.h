// Shapes of the per-species networks and of chains of them.
#pragma once

#include <cstdint>
#include <vector>

namespace kinml {

// Activation codes, in the order of kinml_fast.nn.networks.ACTIVATIONS.
// 0 identity, 1 gaussian exp(-x^2), 2 tanh, 3 relu, 4 silu, 5 celu (alpha 0.1), 6 gelu (exact, erf)
struct NetworkShape {
  std::int64_t n_species;
  std::int64_t n_layers;
  const std::int64_t* sizes;        // [n_species, n_layers + 1], sizes[s][0] = features used
  const std::int64_t* activations;  // [n_layers]
  bool biases;

  std::int64_t size(std::int64_t species, std::int64_t layer) const {
    return sizes[species * (n_layers + 1) + layer];
  }
  // Numbers of one species' parameters. Order: layer by layer W [out, in] row-major, then b [out].
  std::int64_t parameters_of(std::int64_t species) const {
    std::int64_t total = 0;
    for (std::int64_t l = 0; l < n_layers; ++l)
      total += size(species, l + 1) * (size(species, l) + (biases ? 1 : 0));
    return total;
  }
  // Numbers between the rows of a layer's z, h and dL/dz in scratch memory and in `saved`: the size
  // rounded up to whole registers of any instruction set, except for the last layer (one number).
  std::int64_t stride(std::int64_t species, std::int64_t layer) const {
    return layer == n_layers ? size(species, layer) : (size(species, layer) + 15) / 16 * 16;
  }
  // Numbers per atom of one value (z, h, ...) of every layer: the widest species decides. Behind
  // the last layer's one number there is always room for 15 more.
  std::int64_t per_atom() const {
    std::int64_t widest = 0;
    for (std::int64_t s = 0; s < n_species; ++s) {
      std::int64_t total = 0;
      for (std::int64_t l = 1; l <= n_layers; ++l) total += stride(s, l);
      widest = total > widest ? total : widest;
    }
    return (widest + 15) / 16 * 16;
  }
  // Numbers that the forward pass keeps per atom for the backward pass: z and h of every layer.
  // With n = starts[s+1] - starts[s], those of species s begin at saved + starts[s] *
  // saved_per_atom(): the matrices z_1, z_2, ... one after the other, each [n, stride(s, l)], and
  // n * per_atom() numbers later h_1, h_2, ... in the same way. Columns beyond size(s, l) are
  // padding and may hold anything finite or not.
  std::int64_t saved_per_atom() const { return 2 * per_atom(); }
};

// The networks of K levels of theory, lowest first, in a chain: those of level 0 take the D numbers
// of a descriptor; the others one more, the last: the atomic energy of the level below.
struct NetworkChain {
  std::vector<NetworkShape> shapes;  // [K]

  std::int64_t n_levels() const { return static_cast<std::int64_t>(shapes.size()); }
  std::int64_t n_species() const { return shapes[0].n_species; }
  // D, the length of the descriptors.
  std::int64_t length() const { return shapes[0].size(0, 0); }
  // Numbers of the parameters of level k, which follow those of level k - 1.
  std::int64_t parameters_of(std::int64_t k) const {
    std::int64_t total = 0;
    for (std::int64_t s = 0; s < n_species(); ++s) total += shapes[k].parameters_of(s);
    return total;
  }
  std::int64_t parameters() const {
    std::int64_t total = 0;
    for (std::int64_t k = 0; k < n_levels(); ++k) total += parameters_of(k);
    return total;
  }
};

}  // namespace kinml

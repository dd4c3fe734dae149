// Per-species multilayer perceptrons (one network for each element) on the CPU.
//
//   h_0 = features of an atom, z_l = W_l h_{l-1} + b_l, h_l = f_l(z_l), atomic energy = h_L (one
//   number).
//
// Atoms come sorted by species, through an index into the feature matrix, so nothing is copied to
// form a batch. Float64 and float32 (instantiated for both).
#pragma once

#include <cstdint>

namespace kinml::cpu {

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
  // Numbers that the forward pass keeps per atom for the backward pass: z and h of every layer.
  // The widest species decides, so that the atoms of species s begin at
  // saved + starts[s] * saved_per_atom(). There, with n = starts[s+1] - starts[s], stand the
  // matrices z_1, h_1, z_2, h_2, ... one after the other, z_l and h_l each [n, stride(s, l)].
  // Columns beyond size(s, l) are padding and may hold anything finite or not.
  std::int64_t saved_per_atom() const {
    std::int64_t widest = 0;
    for (std::int64_t s = 0; s < n_species; ++s) {
      std::int64_t total = 0;
      for (std::int64_t l = 1; l <= n_layers; ++l) total += 2 * stride(s, l);
      widest = total > widest ? total : widest;
    }
    return (widest + 15) / 16 * 16;
  }
};

// parameters  // flat, species after species, each as in parameters_of
// features    // [*, feature_stride], row r begins at features + r * feature_stride
// rows        // [n_atoms] feature row of the i-th atom in species order
// starts      // [n_species + 1] atoms starts[s] .. starts[s+1] are of species s; n_atoms = last
// saved       // [n_atoms, saved_per_atom()], or null in inference
// atomic      // [n_atoms] network outputs, in species order
template <class T>
void networks_forward(const NetworkShape& shape, const T* parameters, const T* features,
                      std::int64_t feature_stride, const std::int64_t* rows,
                      const std::int64_t* starts, T* saved, T* atomic, int n_threads);

// grad_atomic     // [n_atoms] dL/d(atomic), in species order
// grad_features   // [*, feature_stride] row rows[i] is overwritten for each i; or null
// grad_parameters // as parameters, overwritten (zeros for a species without atoms); or null
template <class T>
void networks_backward(const NetworkShape& shape, const T* parameters, const T* features,
                       std::int64_t feature_stride, const std::int64_t* rows,
                       const std::int64_t* starts, const T* saved, const T* grad_atomic,
                       T* grad_features, T* grad_parameters, int n_threads);

}  // namespace kinml::cpu

// Per-species multilayer perceptrons (one network for each element) on the CPU.
//
//   h_0 = features a of an atom, z_l = W_l h_{l-1} + b_l, h_l = f_l(z_l), atomic energy f = h_L
//   (one number).
//
// Derivatives, for training on energies and forces (forward over reverse):
//   backward           delta_l = t df/dz_l, from delta^h_L = t, delta_l = delta^h_l f'(z_l),
//                      delta^h_{l-1} = W_l^T delta_l; t grad f = delta^h_0
//   tangent            along a direction v of the features: dz_1 = W_1 v, dh_l = f'(z_l) dz_l,
//                      dz_{l+1} = W_{l+1} dh_l; grad f . v = dh_L
//   second backward    of S = e f + t grad f . v: mu^h_L = e,
//                      mu_l = mu^h_l f'(z_l) + delta^h_l f''(z_l) dz_l, mu^h_{l-1} = W_l^T mu_l;
//                      dS/da = mu^h_0
//   weight gradients   dS/dW_l = sum over atoms of mu_l (x) h_{l-1} + delta_l (x) dh_{l-1} with
//                      dh_0 = v, dS/db_l = sum of mu_l; without tangents of t f:
//                      sum of delta_l (x) h_{l-1}, sum of delta_l
//
// Atoms come sorted by species, through an index into the feature matrix, so nothing is copied to
// form a batch. Float64 and float32 (instantiated for both).
//
// The functions work on a batch with all threads. PackedNetworks is for callers that take a few
// molecules (a tile) through all passes on one thread, while they are in its cache.
#pragma once

#include <cstdint>
#include <memory>

#include "../core/network_shape.h"

namespace kinml::cpu {

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

// Derivatives of S = sum_i t_i grad f(a_i) . v_i, with t = grad_atomic.
//
// grad_atomic     // [n_atoms] t, in species order
// tangents        // [*, feature_stride] row rows[i] = v_i
// derivatives     // [n_atoms] dS/dt = grad f . v, in species order; or null
// grad_features   // [*, feature_stride] row rows[i] is overwritten by dS/da_i; or null
// grad_parameters // as parameters, overwritten by dS/dW and dS/db; or null
template <class T>
void networks_second_backward(const NetworkShape& shape, const T* parameters, const T* features,
                              std::int64_t feature_stride, const std::int64_t* rows,
                              const std::int64_t* starts, const T* grad_atomic, const T* tangents,
                              T* derivatives, T* grad_features, T* grad_parameters, int n_threads);

// A few molecules. n = starts[n_species] atoms, sorted by species.
template <class T>
struct NetworkTile {
  const T* features;  // [*, feature_stride]
  std::int64_t feature_stride;
  const std::int64_t* rows;     // [n] row of the i-th atom in features, tangents, grad_features
  const std::int64_t* starts;   // [n_species + 1] atoms starts[s] .. starts[s+1] are of species s
  T* memory;                    // [tile_memory(n)], aligned to 64 bytes: what the passes keep
  const T* tangents = nullptr;  // [*, tangent_stride] directions v; null: no second derivatives
  std::int64_t tangent_stride = 0;
  bool second = true;  // whether the backward pass keeps what second derivatives need
};

// The weights in the order in which the passes read them. The passes of a tile run on the calling
// thread; many threads may use one PackedNetworks, each with a tile of its own. They must come in
// the order of this list, each once; forward begins anew.
template <class T>
class PackedNetworks {
 public:
  // shape's arrays must outlive the object, the parameters need not. Without `of_features` no pass
  // may be asked for grad_features or grad_last.
  PackedNetworks(const NetworkShape& shape, const T* parameters, int n_threads,
                 bool of_features = true);
  // Of what `pack` wrote, which must outlive the object.
  PackedNetworks(const NetworkShape& shape, const T* packed);
  ~PackedNetworks();
  PackedNetworks(const PackedNetworks&) = delete;
  PackedNetworks& operator=(const PackedNetworks&) = delete;

  // Writes the weights in that order, for all passes: packed [packed_numbers], aligned to 64 bytes.
  // The instruction set decides on the order; what no pass reads stays as it is.
  static void pack(const NetworkShape& shape, const T* parameters, T* packed, int n_threads);
  static std::int64_t packed_numbers(const NetworkShape& shape);

  // Numbers that a tile of so many atoms needs.
  std::int64_t tile_memory(std::int64_t n_atoms) const;

  // atomic         // [n] energies f; or null
  void forward(const NetworkTile<T>& tile, T* atomic) const;
  // seeds          // [n] t, or null: 1
  // grad_features  // [*, stride] row rows[i] = t grad f; or null
  // grad_last      // [n] the last number of that row alone; or null
  void backward(const NetworkTile<T>& tile, const T* seeds, T* grad_features, std::int64_t stride,
                T* grad_last = nullptr) const;
  // derivatives    // [n] grad f . v; or null
  void tangent(const NetworkTile<T>& tile, T* derivatives) const;
  // seeds          // [n] e, or null: 0
  // grad_features  // [*, stride] row rows[i] = dS/da; or null
  // grad_last      // [n] the last number of that row alone; or null
  void second_backward(const NetworkTile<T>& tile, const T* seeds, T* grad_features,
                       std::int64_t stride, T* grad_last = nullptr) const;
  // grad_parameters  // like the parameters; dS/dW and dS/db (of a tile without tangents: of t f)
  //                  // are added or, unless `add`, written
  void weight_gradients(const NetworkTile<T>& tile, T* grad_parameters, bool add) const;

 private:
  struct State;
  std::unique_ptr<const State> state_;
};

}  // namespace kinml::cpu

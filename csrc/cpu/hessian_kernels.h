// What hessian_cpu.cpp hands to the kernels of one instruction set (plain data).
//
// A centre with m neighbours at the displacements d, of which its descriptor a depends alone, gives
//   d2e/dd dd' = J^T f'' J + sum_k (df/da_k) d2a_k/dd dd',   J = da/dd
// of its energy e = f(a). The first layer of a network takes W a: J is multiplied with W once, and the
// rest of the network sees 3 m columns of its width.
#pragma once

#include <cstdint>

#include "../core/repulsion.h"
#include "aev_kernels.h"
#include "dispatch.h"

namespace kinml::cpu {

// The network of one level and one species of a centre.
template <class T>
struct HessianNetwork {
  std::int64_t n_layers;
  const std::int64_t* sizes;        // [n_layers + 1]
  const std::int64_t* activations;  // [n_layers]
  bool biases;
  const T* parameters;  // as of NetworkShape::parameters_of
  T* packed;            // [packed_numbers], by hessian_pack

  std::int64_t size(std::int64_t layer) const { return sizes[layer]; }
  std::int64_t widest() const {
    std::int64_t most = 1;
    for (std::int64_t l = 1; l <= n_layers; ++l) most = size(l) > most ? size(l) : most;
    return most;
  }
};

// A derivative by the displacement of a neighbour has the numbers of its own radial block and of the
// angular blocks with each species, each behind the other and padded to whole registers.
template <class T>
std::int64_t hessian_radial(const AevTables<T>& tables) {
  return padded(tables.n_radial);
}
template <class T>
std::int64_t hessian_block(const AevTables<T>& tables) {
  return padded(tables.n_angular * tables.n_sections);
}
template <class T>
std::int64_t hessian_depth(const AevTables<T>& tables) {
  return hessian_radial(tables) + tables.n_species * hessian_block(tables);
}

// Numbers of `packed`: for each species of a neighbour the first layer's weights of these numbers, and
// of its radial block alone, each as right factors; the transposed weights of the other layers.
template <class T>
std::int64_t packed_numbers(const AevTables<T>& tables, const HessianNetwork<T>& network) {
  const std::int64_t first = padded(network.size(1));
  std::int64_t total = tables.n_species * (hessian_depth(tables) + hessian_radial(tables)) * first;
  for (std::int64_t l = 1; l < network.n_layers; ++l)
    total += padded(network.size(l) * network.size(l + 1));
  return total;
}

// Columns of a Hessian in memory: those of m displacements, whole registers.
constexpr std::int64_t hessian_columns(std::int64_t m) {
  return padded(3 * m);
}

// What a centre needs, in numbers of T; networks [n_members, n_levels] are those of its species.
template <class T>
std::int64_t hessian_scratch(const AevTables<T>& tables, const Environment<T>& e,
                             const HessianNetwork<T>* networks, std::int64_t n_levels) {
  const std::int64_t m = e.n_pairs, columns = hessian_columns(m) + 8 * kMaxLanes;
  const std::int64_t depth = hessian_depth(tables), chunk = 4 * kMaxLanes;
  const std::int64_t length = padded(tables.layout().length() + 1);
  const std::int64_t near = padded(m + kMaxLanes);
  std::int64_t total = columns * depth;               // J
  total += 2 * length;                                // descriptor, gradient
  total += 3 * padded(hessian_block(tables) * near);  // factors of a run
  total += 8 * near;                                  // and their vectors
  total += 2 * padded((e.triple_lanes + kMaxLanes) * tables.n_sections);
  total += 6 * padded(e.triple_lanes + kMaxLanes);                  // sums
  total += 9 * padded(m * near + kMaxLanes) + 6 * near + 2 * near;  // second derivatives
  total += 2 * padded(n_levels) + 4 * chunk;
  std::int64_t most = 1;
  for (std::int64_t k = 0; k < n_levels; ++k) {
    const std::int64_t first = padded(networks[k].size(1));
    total += first * (columns + chunk);  // W J, mu
    most = networks[k].widest() > most ? networks[k].widest() : most;
    for (std::int64_t l = 1; l <= networks[k].n_layers; ++l)
      total += padded(networks[k].size(l)) * (5 + chunk);  // z, h, delta, slope, curve; tangents
  }
  return total + 3 * padded(most) * chunk + 16 * kMaxLanes;
}

}  // namespace kinml::cpu

namespace kinml {
#define KINML_DECLARE_HESSIAN(T)                                                                             \
  KINML_DECLARE_KERNEL(void, hessian_pack, const cpu::AevTables<T>&,                                         \
                       const cpu::HessianNetwork<T>&,                                                        \
                       T* scratch) /* [hessian_depth * padded(size(1))] */                                   \
  /* One centre, with its triples: out[row] [3 m, hessian_columns(m)], of which the part at and above the */ \
  /* diagonal is meant, for the rows [n_members, n_levels - first_level]. */                                 \
  /* networks [n_members, n_levels]; repels [n_species], of the centre's, or null */                         \
  KINML_DECLARE_KERNEL(void, hessian_centre, const cpu::AevTables<T>&, const cpu::Environment<T>&,           \
                       const cpu::HessianNetwork<T>* networks, std::int64_t n_members,                       \
                       std::int64_t n_levels, std::int64_t first_level,                                      \
                       const RepulsionPair<T>* repels, T* out, T* scratch)
KINML_DECLARE_HESSIAN(double)
KINML_DECLARE_HESSIAN(float)
#undef KINML_DECLARE_HESSIAN
}  // namespace kinml

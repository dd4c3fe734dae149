// The repulsion of core/repulsion.h by one warp: of one centre its energy, and the gradient with
// respect to the displacements of its neighbours; numbers N as in aev_group.h. It has few
// neighbours.
#pragma once

#include <cstdint>
#include <string>

#include "../core/repulsion.h"
#include "aev_tables.h"
#include "group.h"
#include "pairs.h"

namespace kinml::cuda {

inline constexpr int kMostRepelling = 64;  // species

// Argument of a kernel.
template <class T>
struct RepulsionArguments {
  RepulsionSpecies<T> species[kMostRepelling];
  T inner, outer;
};

template <class T>
RepulsionArguments<T> repulsion_arguments(const Repulsion& r) {
  const auto species = repulsion_species(r);
  if (species.size() > static_cast<std::size_t>(kMostRepelling))
    throw Error("a repulsion on a GPU may be of up to " + std::to_string(kMostRepelling) +
                " elements, not " + std::to_string(species.size()) + ".");
  RepulsionArguments<T> a{};
  for (std::size_t i = 0; i < species.size(); ++i)
    a.species[i] = {static_cast<T>(species[i].charge), static_cast<T>(species[i].power),
                    static_cast<T>(species[i].radius)};
  a.inner = static_cast<T>(r.inner);
  a.outer = static_cast<T>(r.outer);
  return a;
}

// Of a centre and its k-th neighbour; both are of valid species.
template <class T, class N>
KINML_DEVICE Repelled<N> repelled(const RepulsionArguments<T>& a, const Neighbours<N>& nb,
                                  const std::int64_t* species, std::int64_t centre, int k) {
  return repulsion(nb.r()[k], repulsion_pair(a.species[species[centre]],
                                             a.species[species[nb.index[k]]], a.inner, a.outer));
}

// out: one number
template <class T, class N>
KINML_DEVICE void repulsion_row(const Warp& warp, const RepulsionArguments<T>& a,
                                const Neighbours<N>& nb, const std::int64_t* species,
                                std::int64_t centre, T* out) {
  warp.each(1, [&](int) {
    N sum(T(0));
    for (int k = 0; !nb.spoiled && k < nb.count; ++k)
      sum += repelled(a, nb, species, centre, k).value;
    *out = nb.spoiled ? aev_detail::kNan<T> : aev_detail::result(sum);
  });
}

// g: one number; p [count, 3] as of aev_row_transposed
template <class T, class N>
KINML_DEVICE void repulsion_transposed(const Warp& warp, const RepulsionArguments<T>& a,
                                       const Neighbours<N>& nb, const std::int64_t* species,
                                       std::int64_t centre, const T* g, N* p) {
  using namespace aev_detail;
  warp.each(nb.count, [&](int k) {
    if (nb.spoiled) {
      for (int d = 0; d < 3; ++d) p[3 * k + d] = N(kNan<T>) * N(kNan<T>);
      return;
    }
    const N slope = scale(*g, repelled(a, nb, species, centre, k).slope);
    p[3 * k] = slope * nb.ux()[k];
    p[3 * k + 1] = slope * nb.uy()[k];
    p[3 * k + 2] = slope * nb.uz()[k];
  });
}

}  // namespace kinml::cuda

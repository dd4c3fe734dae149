// The chain of networks of several levels of theory for the rows (atoms) of a tile, by one block:
// what connects a level with the ones below and above. Formulas and names:
// csrc/cpu/force_step_cpu.h.
//
// A row of features is the descriptor a, of `length` numbers, and behind it eps_{k-1}; a row of
// gradients is p_k, which becomes g_k, and behind it c_k.
#pragma once

#include "group.h"

namespace kinml::cuda {

template <class T>
struct ChainRows {
  int n, stride, length;

  // The energies of the level below as the last input of the next.
  // below  // [n] eps_{k-1}
  KINML_DEVICE void set_input(const Block& block, const T* below, T* features) const {
    block.each(n, [&](int p) { features[p * stride + length] = below[p]; });
  }
  // eps_k = eps_{k-1} + f_k.
  // below  // [n] eps_{k-1}; null: 0
  template <class Value>
  KINML_DEVICE void add_energies(const Block& block, const T* below, const Value& value,
                                 T* eps) const {
    block.each(n, [&](int p) { eps[p] = (below != nullptr ? below[p] : T(0)) + value(p); });
  }
  // g_k = p_k + (1 + c_k) g_{k-1}.
  // below(p, d)  // g_{k-1}
  // slopes       // [n] c_k is written
  template <class Below>
  KINML_DEVICE void add_gradients(const Block& block, const Below& below, T* g, T* slopes) const {
    block.each(n, [&](int p) { slopes[p] = g[p * stride + length]; });
    block.each(n * length, [&](int item) {
      const int p = item / length, d = item % length;
      g[p * stride + d] += (1 + slopes[p]) * below(p, d);
    });
  }
  // U_k = v_k + (1 + c_{k+1}) U_{k+1}, and 0 behind it.
  // u             // v_k, then U_k
  // above, slopes // U_{k+1} and [n] c_{k+1}; null at the highest level
  KINML_DEVICE void add_directions(const Block& block, const T* above, const T* slopes,
                                   T* u) const {
    block.each(n * stride, [&](int item) {
      const int p = item / stride, d = item % stride;
      if (d >= length)
        u[item] = 0;
      else if (above != nullptr)
        u[item] += (1 + slopes[p]) * above[item];
    });
  }
  // T_k = g_{k-1} . U_k, behind U_k.
  KINML_DEVICE void set_direction_of_input(const Block& block, const T* gradients_below,
                                           T* u) const {
    block.each(n, [&](int p) {
      T sum = 0;
      for (int d = 0; d < length; ++d) sum += gradients_below[p * stride + d] * u[p * stride + d];
      u[p * stride + length] = sum;
    });
  }
};

}  // namespace kinml::cuda

// Where everything of an environment stands (aev_kernels.h), for its kernels. For files that are
// compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../core/aev_layout.h"
#include "../core/aev_terms.h"
#include "aev_kernels.h"
#include "lanes.h"
#include "pairs.h"

namespace kinml {
inline namespace KINML_ISA {

using cpu::AevTables;
using cpu::Environment;

// x^(zeta - 1). zeta = 8 is what aevmod and so everybody has.
template <bool kEight, class T, class N, class Choose>
KINML_HD N power_below(const AevTables<T>& t, N x, N one, const Choose& at_least) {
  if constexpr (kEight) {
    const N square = x * x;
    return (square * square) * (square * x);
  } else {
    if (t.integer_zeta > 0) return integer_power(x, one, t.integer_zeta - 1);
    return exp(N(t.zeta - T(1)) * log(at_least(x, sizeof(T) == 8 ? T(1e-60) : T(1e-12))));
  }
}

// Triples stand in registers of W, and their numbers kind after kind: [5 + n_angular, W]. Pointer
// (to numbers, or Planes) leads to a register, or to the lane of one triple in it.
template <class T, class Pointer>
struct Triples {
  static constexpr int W = kNativeWidth<T>;
  Pointer first;

  static constexpr Index kinds(Index n_angular) { return 5 + n_angular; }
  KINML_HD Pointer half_cosine() const { return first; }
  KINML_HD Pointer half_sine() const { return first + W; }
  KINML_HD Pointer ratio() const { return first + 2 * W; }  // -dsin/dcos
  KINML_HD Pointer mean() const { return first + 3 * W; }   // distance (R_ij + R_ik) / 2
  KINML_HD Pointer weight() const { return first + 4 * W; }
  KINML_HD Pointer gaussian(Index l) const { return first + (5 + l) * W; }  // E_l
  KINML_HD Triples lane(Index i) const { return {first + i}; }
};

template <class T, bool kDual>
struct View : Pairs<T, kDual> {
  static constexpr int W = kNativeWidth<T>;
  const AevTables<T>& t;
  AevLayout layout;
  Index radial_row;
  Planes<T> fc, slope;            // [n_pairs] radial cutoff function and its derivative
  Planes<T> near_fc, near_slope;  // [n_pairs] angular; of any value beyond its cutoff
  Planes<T> radial;               // [n_pairs, radial_row] exp(-eta (R - shift_l)^2)
  T* triples;
  Index group;  // numbers of a register of triples

  View(const AevTables<T>& tables, const Environment<T>& e)
      : View(tables, e, Arena<T>{e.pairs, kDual ? 2 : 1}) {}

  KINML_HD Triples<T, Planes<T>> triple(Index g) const {
    T* p = triples + g * group;
    return {{p, kDual ? p + group / 2 : p}};
  }
  // The numbers without their tangents.
  KINML_HD Triples<T, const T*> plain_triple(Index g) const { return {triples + g * group}; }
  Index n_triples(Index centre, Index a, Index b) const {
    const Index n = this->near_count(centre, a), m = this->near_count(centre, b);
    return a == b ? n * (n - 1) / 2 : n * m;
  }
  // Calls f(a, b, n_triples, g) for the species pairs of a centre; g is the first register of their
  // triples, and moves to the first one of the next centre.
  template <class F>
  void for_pairs(Index centre, Index& g, const F& f) const {
    for (Index a = 0; a < this->n_species; ++a)
      for (Index b = a; b < this->n_species; ++b) {
        const Index n = n_triples(centre, a, b);
        f(a, b, n, g);
        g += (n + W - 1) / W;
      }
  }
  // Calls f(j, k, count, place) for runs of triples with the same first neighbour j and the second
  // ones k, k + 1, ... in the order in which the triples are numbered.
  template <class F>
  void for_runs(Index centre, Index a, Index b, const F& f) const {
    const Index fa = this->begin(centre, a), ja = fa + this->near_count(centre, a);
    const Index fb = this->begin(centre, b), kb = fb + this->near_count(centre, b);
    Index place = 0;
    for (Index j = fa; j < ja; ++j) {
      const Index k = a == b ? j + 1 : fb;
      if (k < kb) f(j, k, kb - k, place);
      place += kb - k;
    }
  }

 private:
  View(const AevTables<T>& tables, const Environment<T>& e, Arena<T> arena)
      : Pairs<T, kDual>(e, tables.n_species, arena),
        t(tables),
        layout(tables.layout()),
        radial_row(padded(tables.n_radial, W)),
        triples(e.triples),
        group((kDual ? 2 : 1) * Triples<T, T*>::kinds(tables.n_angular) * W) {
    const Index room = e.pair_room();
    for (Planes<T>* p : {&fc, &slope, &near_fc, &near_slope}) *p = arena.take(room);
    radial = arena.take(room * radial_row);
  }
};

}  // namespace KINML_ISA
}  // namespace kinml

// What the kernels of atomic environment vectors share: numbers with and without a tangent, and
// where everything of an environment stands (aev_kernels.h). For files that are compiled once per
// instruction set.
#pragma once

#include <cstdint>

#include "../core/aev_layout.h"
#include "../core/aev_terms.h"
#include "aev_kernels.h"
#include "simd_functions.h"

namespace kinml {
inline namespace KINML_ISA {

using cpu::AevTables;
using cpu::Environment;
using cpu::padded;
using Index = std::int64_t;

// Found by argument-dependent lookup from the formulas of core.
template <class T, int W>
KINML_HD SineCosine<Vec<T, W>> sine_cosine(Vec<T, W> x) {
  return sine_cosine_series<T>(x);
}
// Numbers in memory: a plane of values and, for dual numbers, a plane of tangents.
template <class T>
struct Planes {
  T* value;
  T* tangent;
  KINML_HD Planes operator+(Index n) const { return {value + n, tangent + n}; }
};

// The register type and the memory access of plain (kDual = false) or dual numbers.
template <class T, bool kDual>
struct Lanes;

template <class T>
struct Lanes<T, false> {
  using V = Vec<T, kNativeWidth<T>>;
  using L = V;
  static KINML_HD L plain(V x) { return x; }
  static KINML_HD L load(Planes<T> p) { return V::load(p.value); }
  static KINML_HD L broadcast(Planes<T> p) { return V(*p.value); }
  static KINML_HD void store(Planes<T> p, L x) { x.store(p.value); }
  static KINML_HD void store_sum(Planes<T> p, L x) { *p.value = reduce_add(x); }
  static KINML_HD void clear(Planes<T> p) { *p.value = T(0); }
  static KINML_HD L scale(V a, L x) { return a * x; }
  static KINML_HD V result(L x) { return x; }  // the part that the caller wants
  static KINML_HD V value(L x) { return x; }
  static KINML_HD L choose(V a, V b, L if_ge, L otherwise) {
    return select_ge(a, b, if_ge, otherwise);
  }
  static KINML_HD L root(L x) { return sqrt(x); }
  static KINML_HD L gauss(L x) { return gaussian(x); }
};

template <class T>
struct Lanes<T, true> {
  using V = Vec<T, kNativeWidth<T>>;
  using L = Dual<V>;
  static KINML_HD L plain(V x) { return L(x, V(T(0))); }
  static KINML_HD L load(Planes<T> p) { return L(V::load(p.value), V::load(p.tangent)); }
  static KINML_HD L broadcast(Planes<T> p) { return L(V(*p.value), V(*p.tangent)); }
  static KINML_HD void store(Planes<T> p, L x) {
    x.value.store(p.value);
    x.tangent.store(p.tangent);
  }
  static KINML_HD void store_sum(Planes<T> p, L x) {
    *p.value = reduce_add(x.value);
    *p.tangent = reduce_add(x.tangent);
  }
  static KINML_HD void clear(Planes<T> p) { *p.value = *p.tangent = T(0); }
  static KINML_HD L scale(V a, L x) { return L(a * x.value, a * x.tangent); }
  static KINML_HD V result(L x) { return x.tangent; }
  static KINML_HD V value(L x) { return x.value; }
  static KINML_HD L choose(V a, V b, L if_ge, L otherwise) {
    return L(select_ge(a, b, if_ge.value, otherwise.value),
             select_ge(a, b, if_ge.tangent, otherwise.tangent));
  }
  static KINML_HD L root(L x) {
    const V r = sqrt(x.value);
    return L(r, x.tangent / (r + r));
  }
  static KINML_HD L gauss(L x) {
    const V g = gaussian(x.value);
    return L(g, V(T(-2)) * x.value * g * x.tangent);
  }
};

// The first `count` lanes, zero in the others.
template <class T, int W>
KINML_HD Vec<T, W> keep_first(Vec<T, W> x, Index count) {
  Vec<T, W> lane;
  for (int i = 0; i < W; ++i) lane.raw[i] = static_cast<T>(i);
  return lane.raw < Vec<T, W>(static_cast<T>(count)).raw ? x.raw : Vec<T, W>(T(0)).raw;
}
template <class V>
KINML_HD Dual<V> keep_first(Dual<V> x, Index count) {
  return {keep_first(x.value, count), keep_first(x.tangent, count)};
}

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

// Takes aligned pieces from memory.
template <class T>
struct Arena {
  T* next;
  int planes = 1;

  T* numbers(Index n) {
    T* p = next;
    next += padded(n);
    return p;
  }
  std::int32_t* integers(Index n) {  // an int32 is never longer than a T
    return reinterpret_cast<std::int32_t*>(numbers(n));
  }
  Planes<T> take(Index n) {
    T* value = numbers(n);
    return {value, planes == 2 ? numbers(n) : value};
  }
};

// Where everything of an environment stands.
template <class T, bool kDual>
struct View {
  static constexpr int W = kNativeWidth<T>;
  const AevTables<T>& t;
  AevLayout layout;
  Index n_species, radial_row;
  Planes<T> ux, uy, uz, r, inverse_r;  // [n_pairs] unit vector from the centre, distance
  Planes<T> fc, slope;                 // [n_pairs] radial cutoff function and its derivative
  Planes<T> near_fc, near_slope;       // [n_pairs] angular; of any value beyond its cutoff
  Planes<T> radial;                    // [n_pairs, radial_row] exp(-eta (R - shift_l)^2)
  std::int32_t* index;                 // [n_pairs] atom
  std::int32_t* first;                 // [n_centres * n_species + 1] first pair of each segment
  std::int32_t* near;       // [n_centres * n_species] so many pairs at its front are angular ones
  std::int32_t* candidate;  // [max_candidates]
  std::int32_t* key;        // [max_candidates]
  std::int32_t* counts;     // [2 n_species + 1]
  T* triples;
  Index group;  // numbers of a register of triples

  View(const AevTables<T>& tables, const Environment<T>& e)
      : t(tables),
        layout{tables.n_species, tables.n_radial, tables.n_angular, tables.n_sections},
        n_species(tables.n_species),
        radial_row(padded(tables.n_radial, W)),
        triples(e.triples),
        group((kDual ? 2 : 1) * Index(5 + tables.n_angular) * W) {
    Arena<T> arena{e.pairs, kDual ? 2 : 1};
    const Index room = e.pair_room();
    for (Planes<T>* p : {&ux, &uy, &uz, &r, &inverse_r, &fc, &slope, &near_fc, &near_slope})
      *p = arena.take(room);
    radial = arena.take(room * radial_row);
    index = arena.integers(room);
    first = arena.integers(e.n_centres() * n_species + 1);
    near = arena.integers(e.n_centres() * n_species);
    candidate = arena.integers(e.structure.max_candidates);
    key = arena.integers(e.structure.max_candidates);
    counts = arena.integers(2 * n_species + 1);
  }

  // Register g of the triples, as [5 + n_angular, W]: half cos(theta), half sin(theta),
  // dsin/dcos = -ratio, mean distance, weight, E_0, E_1, ...
  KINML_HD Planes<T> triple(Index g) const {
    T* p = triples + g * group;
    return {p, kDual ? p + group / 2 : p};
  }
  Index n_triples(Index centre, Index a, Index b) const {
    const Index n = near[centre * n_species + a], m = near[centre * n_species + b];
    return a == b ? n * (n - 1) / 2 : n * m;
  }
  // Calls f(a, b, n_triples, g) for the species pairs of a centre; g is the first register of their
  // triples, and moves to the first one of the next centre.
  template <class F>
  void for_pairs(Index centre, Index& g, const F& f) const {
    for (Index a = 0; a < n_species; ++a)
      for (Index b = a; b < n_species; ++b) {
        const Index n = n_triples(centre, a, b);
        f(a, b, n, g);
        g += (n + W - 1) / W;
      }
  }
  // Calls f(j, k, count, place) for runs of triples with the same first neighbour j and the second
  // ones k, k + 1, ... in the order in which the triples are numbered.
  template <class F>
  void for_runs(Index centre, Index a, Index b, const F& f) const {
    const Index fa = first[centre * n_species + a], ja = fa + near[centre * n_species + a];
    const Index fb = first[centre * n_species + b], kb = fb + near[centre * n_species + b];
    Index place = 0;
    for (Index j = fa; j < ja; ++j) {
      const Index k = a == b ? j + 1 : fb;
      if (k < kb) f(j, k, kb - k, place);
      place += kb - k;
    }
  }
};

}  // namespace KINML_ISA
}  // namespace kinml

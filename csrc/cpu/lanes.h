// Numbers with and without a tangent, in registers and in memory, for the kernels of atomic
// environment vectors. For files that are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../core/aev_terms.h"
#include "aev_kernels.h"
#include "simd_functions.h"

namespace kinml {
inline namespace KINML_ISA {

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

}  // namespace KINML_ISA
}  // namespace kinml

#include "repulsion_kernels.h"

#include <type_traits>

#include "aev_view.h"
#include "denormals.h"

namespace kinml {
inline namespace KINML_ISA {
namespace {

// The pairs of an environment whose neighbours are found.
template <class T, bool kDual>
Pairs<T, kDual> pairs_of(const AevTables<T>& tables, const Environment<T>& e) {
  Arena<T> arena{e.pairs, kDual ? 2 : 1};
  return {e, tables.n_species, arena};
}

template <class T, bool kDual>
using Number = std::conditional_t<kDual, Dual<T>, T>;
template <bool kDual, class T>
Number<T, kDual> number(Planes<T> p, Index k) {
  if constexpr (kDual)
    return {p.value[k], p.tangent[k]};
  else
    return p.value[k];
}

// Calls f(centre, k, repelled) for the pairs k of all centres.
template <bool kDual, class T, class F>
void for_pairs(const RepulsionPair<T>* of_species, const AevTables<T>& tables,
               const Environment<T>& e, const Pairs<T, kDual>& pairs, const F& f) {
  for (Index c = 0; c < e.n_centres(); ++c) {
    const RepulsionPair<T>* const row =
        of_species + e.structure.species[e.begin + c] * tables.n_species;
    for (Index a = 0; a < tables.n_species; ++a)
      for (Index k = pairs.begin(c, a); k < pairs.end(c, a); ++k)
        f(e.begin + c, k, repulsion(number<kDual>(pairs.r, k), row[a]));
  }
}

template <class T>
T plain(T x) {
  return x;
}
// Of a dual number the derivative is what is wanted.
template <class T>
T plain(Dual<T> x) {
  return x.tangent;
}

template <class T>
void rows(const RepulsionPair<T>* of_species, const AevTables<T>& tables, const Environment<T>& e,
          T* out) {
  const auto pairs = pairs_of<T, false>(tables, e);
  for (Index i = e.begin; i < e.end; ++i) out[i] = T(0);
  for_pairs<false>(of_species, tables, e, pairs,
                   [&](Index i, Index, Repelled<T> x) { out[i] += x.value; });
}

template <class T>
void tangent_rows(const RepulsionPair<T>* of_species, const AevTables<T>& tables,
                  const Environment<T>& e, const T* v, T* out) {
  const auto pairs = pairs_of<T, false>(tables, e);
  for (Index i = e.begin; i < e.end; ++i) out[i] = T(0);
  for_pairs<false>(of_species, tables, e, pairs, [&](Index i, Index k, Repelled<T> x) {
    const Displacement<T> d = displacement(v, i, pairs.index[k]);
    out[i] +=
        x.slope * (pairs.ux.value[k] * d.x + pairs.uy.value[k] * d.y + pairs.uz.value[k] * d.z);
  });
}

template <class T, bool kDual>
void transposed(const RepulsionPair<T>* of_species, const AevTables<T>& tables,
                const Environment<T>& e, const T* g, T* out, T* virials) {
  using N = Number<T, kDual>;
  const auto pairs = pairs_of<T, kDual>(tables, e);
  const Planes<T> unit[3] = {pairs.ux, pairs.uy, pairs.uz};
  if (virials != nullptr)
    for (Index x = 9 * e.begin; x < 9 * e.end; ++x) virials[x] = T(0);
  for_pairs<kDual>(of_species, tables, e, pairs, [&](Index i, Index k, Repelled<N> x) {
    const Index j = pairs.index[k];
    for (int d = 0; d < 3; ++d) {
      const T p = g[i] * plain(x.slope * number<kDual>(unit[d], k));
      out[3 * j + d] += p;
      out[3 * i + d] -= p;
      for (int b = 0; virials != nullptr && b < 3; ++b)
        virials[9 * i + 3 * d + b] += p * pairs.r.value[k] * unit[b].value[k];
    }
  });
}

}  // namespace

#define KINML_DEFINE_REPULSION(T)                                                        \
  void repulsion_rows(const RepulsionPair<T>* pairs, const AevTables<T>& tables,         \
                      const Environment<T>& e, T* out) {                                 \
    const FlushDenormals<T> flush;                                                       \
    rows(pairs, tables, e, out);                                                         \
  }                                                                                      \
  void repulsion_tangent_rows(const RepulsionPair<T>* pairs, const AevTables<T>& tables, \
                              const Environment<T>& e, const T* v, T* out) {             \
    const FlushDenormals<T> flush;                                                       \
    tangent_rows(pairs, tables, e, v, out);                                              \
  }                                                                                      \
  void repulsion_transposed(const RepulsionPair<T>* pairs, const AevTables<T>& tables,   \
                            const Environment<T>& e, const T* g, T* out, T* virials) {   \
    const FlushDenormals<T> flush;                                                       \
    e.direction == nullptr ? transposed<T, false>(pairs, tables, e, g, out, virials)     \
                           : transposed<T, true>(pairs, tables, e, g, out, nullptr);     \
  }
KINML_DEFINE_REPULSION(double)
KINML_DEFINE_REPULSION(float)
#undef KINML_DEFINE_REPULSION

}  // namespace KINML_ISA
}  // namespace kinml

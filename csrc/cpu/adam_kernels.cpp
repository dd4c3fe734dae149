#include "adam_kernels.h"

#include "denormals.h"
#include "simd.h"

namespace kinml {
inline namespace KINML_ISA {
namespace {

template <class T>
void range(const AdamFactors<T>& f, std::int64_t n, T* p, const T* g, T* m, T* v, T* largest) {
  constexpr int W = kNativeWidth<T>;
  using V = Vec<T, W>;
  const FlushDenormals<T> flush;
  // The last, partial register goes through a buffer, so that one code serves all numbers.
  alignas(64) T rest[5][W] = {};
  for (std::int64_t i = 0; i < n; i += W) {
    const bool whole = i + W <= n;
    const std::int64_t count = whole ? W : n - i;
    if (!whole)
      for (std::int64_t k = 0; k < count; ++k) {
        rest[0][k] = p[i + k];
        rest[1][k] = g[i + k];
        rest[2][k] = m[i + k];
        rest[3][k] = v[i + k];
        if (largest != nullptr) rest[4][k] = largest[i + k];
      }
    T* pi = whole ? p + i : rest[0];
    const T* gi = whole ? g + i : rest[1];
    T* mi = whole ? m + i : rest[2];
    T* vi = whole ? v + i : rest[3];
    T* li = largest == nullptr ? nullptr : whole ? largest + i : rest[4];
    V pv = V::load(pi), mv = V::load(mi), vv = V::load(vi);
    if (li != nullptr) {
      V lv = V::load(li);
      adam_update(f, pv, V::load(gi), mv, vv, &lv);
      lv.store(li);
    } else {
      adam_update(f, pv, V::load(gi), mv, vv, static_cast<V*>(nullptr));
    }
    pv.store(pi);
    mv.store(mi);
    vv.store(vi);
    if (!whole)
      for (std::int64_t k = 0; k < count; ++k) {
        p[i + k] = rest[0][k];
        m[i + k] = rest[2][k];
        v[i + k] = rest[3][k];
        if (largest != nullptr) largest[i + k] = rest[4][k];
      }
  }
}

}  // namespace

void adam_range(const AdamFactors<double>& f, std::int64_t n, double* p, const double* g, double* m,
                double* v, double* largest) {
  range(f, n, p, g, m, v, largest);
}
void adam_range(const AdamFactors<float>& f, std::int64_t n, float* p, const float* g, float* m,
                float* v, float* largest) {
  range(f, n, p, g, m, v, largest);
}

}  // namespace KINML_ISA
}  // namespace kinml

#include "force_step_kernels.h"

#include "denormals.h"

namespace kinml {
inline namespace KINML_ISA {
namespace {

template <class T>
void sum(const T* parts, std::int64_t n_parts, std::int64_t stride, std::int64_t n, T* out) {
  const FlushDenormals<T> flush;
  for (std::int64_t i = 0; i < n; ++i) out[i] = parts[i];
  for (std::int64_t p = 1; p < n_parts; ++p) {
    const T* const part = parts + p * stride;
    for (std::int64_t i = 0; i < n; ++i) out[i] += part[i];
  }
}

}  // namespace

void sum_parts(const double* parts, std::int64_t n_parts, std::int64_t stride, std::int64_t n,
               double* out) {
  sum(parts, n_parts, stride, n, out);
}
void sum_parts(const float* parts, std::int64_t n_parts, std::int64_t stride, std::int64_t n,
               float* out) {
  sum(parts, n_parts, stride, n, out);
}

}  // namespace KINML_ISA
}  // namespace kinml

#include "force_step_kernels.h"

#include <algorithm>

#include "../core/shares.h"
#include "denormals.h"

namespace kinml {
inline namespace KINML_ISA {
namespace {

using Index = std::int64_t;

constexpr Index kBlock = 512;  // numbers at a time: sums of a few heights stay in the first cache

template <class T>
void sum(const T* const* rows, const Index* firsts, Index n_rows, Index n, T* out) {
  const FlushDenormals<T> flush;
  alignas(64) T sums[TreeSum<const T*>::kHeights][kBlock];
  for (Index begin = 0; begin < n; begin += kBlock) {
    const Index count = std::min(kBlock, n - begin);
    const auto add = [&](const T* left, const T* right, int place) -> const T* {
      T* const to = sums[place];
      for (Index i = 0; i < count; ++i) to[i] = left[i] + right[i];
      return to;
    };
    TreeSum<const T*> tree;
    for (Index r = 0; r < n_rows; ++r) tree.push(rows[r] + begin, firsts[r + 1] - firsts[r], add);
    std::copy_n(tree.total(add), count, out + begin);
  }
}

}  // namespace

void sum_tree(const double* const* rows, const Index* firsts, Index n_rows, Index n, double* out) {
  sum(rows, firsts, n_rows, n, out);
}
void sum_tree(const float* const* rows, const Index* firsts, Index n_rows, Index n, float* out) {
  sum(rows, firsts, n_rows, n, out);
}

}  // namespace KINML_ISA
}  // namespace kinml

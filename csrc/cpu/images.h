// Places of the atoms of a periodic structure and of their images, as far as a cutoff reaches: a
// cluster, among which neighbours are found as in a molecule (cell_grid.h, pairs.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../core/lattice.h"
#include "aev_kernels.h"

namespace kinml::cpu {

class Images {
 public:
  // Atoms are moved into the cell first: coordinates may be unwrapped. Numbers are float64, so that
  // displacements in float32 lose nothing by the way.
  template <class T>
  void build(const Lattice& lattice, const T* x, std::int64_t n, double reach) {
    places_.clear();
    atoms_.clear();
    fractions_.resize(3 * n);
    places_.reserve(3 * n);
    for (std::int64_t a = 0; a < n; ++a) {
      const double at[3] = {static_cast<double>(x[3 * a]), static_cast<double>(x[3 * a + 1]),
                            static_cast<double>(x[3 * a + 2])};
      double home[3];
      for (int k = 0; k < 3; ++k) {
        const double fraction = lattice.fraction(k, at[0], at[1], at[2]);
        const double whole = lattice.periodic[k] ? std::floor(fraction) : 0.0;
        home[k] = -whole;
        fractions_[3 * a + k] = fraction - whole;
      }
      add(lattice, at, home, a);
    }
    for (std::int64_t a = 0; a < n; ++a) {
      // A place that is not a number has no images.
      const double* const f = fractions_.data() + 3 * a;
      if (!std::isfinite(f[0] + f[1] + f[2])) continue;
      int low[3] = {0, 0, 0}, high[3] = {0, 0, 0};
      for (int k = 0; k < 3; ++k) {
        if (!lattice.periodic[k]) continue;
        const double margin = reach / lattice.heights[k] * (1 + 1e-9) + 1e-9;
        low[k] = static_cast<int>(std::ceil(-margin - f[k]));
        high[k] = static_cast<int>(std::floor(1 + margin - f[k]));
      }
      const double home[3] = {places_[3 * a], places_[3 * a + 1], places_[3 * a + 2]};
      for (int i = low[0]; i <= high[0]; ++i)
        for (int j = low[1]; j <= high[1]; ++j)
          for (int k = low[2]; k <= high[2]; ++k) {
            const double cells[3] = {double(i), double(j), double(k)};
            if (i != 0 || j != 0 || k != 0) add(lattice, home, cells, a);
          }
    }
  }
  std::int64_t count() const { return static_cast<std::int64_t>(atoms_.size()); }
  const double* places() const { return places_.data(); }      // [count, 3], the atoms first
  const std::int32_t* atoms() const { return atoms_.data(); }  // [count]

 private:
  void add(const Lattice& lattice, const double* from, const double* cells, std::int64_t atom) {
    for (int d = 0; d < 3; ++d) places_.push_back(from[d] + lattice.translation(d, cells));
    atoms_.push_back(static_cast<std::int32_t>(atom));
  }

  std::vector<double> places_, fractions_;
  std::vector<std::int32_t> atoms_;
};

}  // namespace kinml::cpu

// Where the neighbours of the atoms of a structure are looked for (pairs.h): the cells of a grid.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "aev_kernels.h"

namespace kinml::cpu {

// Up to this many atoms all pairs are tried: a cell list would cost more.
inline constexpr std::int64_t kOneCell = 64;

// Sorts the places of the atoms of one structure into cells.
class CellGrid {
 public:
  template <class T>
  void build(const T* x, std::int64_t n, double cell_size) {
    dims_[0] = dims_[1] = dims_[2] = 1;
    double low[3] = {0, 0, 0};
    if (n > kOneCell) {
      for (int d = 0; d < 3; ++d) {
        double lo = std::numeric_limits<double>::infinity(), hi = -lo;
        for (std::int64_t i = 0; i < n; ++i) {  // NaN changes neither
          lo = std::min<double>(lo, x[3 * i + d]);
          hi = std::max<double>(hi, x[3 * i + d]);
        }
        low[d] = lo;
        // The bound keeps the grid small when atoms are far apart.
        const double cells = std::floor((hi - lo) / cell_size);
        // Coordinates that are not finite give one cell.
        dims_[d] = cells >= 1 ? static_cast<int>(std::min(cells, std::cbrt(8.0 * n) + 1)) : 1;
        inverse_[d] = hi > lo ? dims_[d] / (hi - lo) : 0.0;
      }
    }
    const std::int64_t n_cells = std::int64_t(dims_[0]) * dims_[1] * dims_[2];
    starts_.assign(n_cells + 1, 0);
    atoms_.resize(n);
    cell_.resize(n);
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t cell = 0;
      bool known = true;
      for (int d = 0; d < 3; ++d) {
        std::int64_t c = 0;
        if (dims_[d] > 1) {
          const double place = (x[3 * i + d] - low[d]) * inverse_[d];
          c = place >= 1 ? static_cast<std::int64_t>(std::min(place, dims_[d] - 1.0)) : 0;
        }
        known = known && !std::isnan(x[3 * i + d]);
        cell = cell * dims_[d] + c;
      }
      cell_[i] = known ? static_cast<std::int32_t>(cell) : -1;
    }
    // An atom whose place is not a number keeps the first other one company, whose vector it
    // spoils: alone nobody would notice it.
    const auto other =
        std::find_if(cell_.begin(), cell_.end(), [](auto cell) { return cell >= 0; });
    const std::int32_t home = other == cell_.end() ? 0 : *other;
    for (std::int32_t& cell : cell_) {
      if (cell < 0) cell = home;
      ++starts_[cell + 1];
    }
    for (std::int64_t c = 0; c < n_cells; ++c) starts_[c + 1] += starts_[c];
    next_.assign(starts_.begin(), starts_.end() - 1);
    for (std::int64_t i = 0; i < n; ++i) atoms_[next_[cell_[i]]++] = static_cast<std::int32_t>(i);
    max_candidates_ = 0;
    for (int ix = 0; ix < dims_[0]; ++ix)
      for (int iy = 0; iy < dims_[1]; ++iy)
        for (int iz = 0; iz < dims_[2]; ++iz)
          max_candidates_ = std::max(max_candidates_, around(ix, iy, iz));
  }

  template <class T>
  void describe(StructureView<T>& view) const {
    view.cell_starts = starts_.data();
    view.cell_places = atoms_.data();
    view.place_cell = cell_.data();
    view.nx = dims_[0];
    view.ny = dims_[1];
    view.nz = dims_[2];
    view.max_candidates = max_candidates_;
  }

 private:
  std::int64_t around(int cx, int cy, int cz) const {
    std::int64_t total = 0;
    for (int ix = std::max(cx - 1, 0); ix <= std::min(cx + 1, dims_[0] - 1); ++ix)
      for (int iy = std::max(cy - 1, 0); iy <= std::min(cy + 1, dims_[1] - 1); ++iy) {
        const std::int64_t row = (std::int64_t(ix) * dims_[1] + iy) * dims_[2];
        total +=
            starts_[row + std::min(cz + 1, dims_[2] - 1) + 1] - starts_[row + std::max(cz - 1, 0)];
      }
    return total;
  }

  int dims_[3] = {1, 1, 1};
  double inverse_[3] = {0, 0, 0};
  std::vector<std::int32_t> starts_, atoms_, cell_, next_;
  std::int64_t max_candidates_ = 0;
};

}  // namespace kinml::cpu

// The cells of a grid by which the atoms of large structures are sorted, so that the neighbours of
// one are in few ranges of them. A cell is a little wider than the longer cutoff, so that
// neighbours are in the same or an adjacent one for all roundings of the coordinates. Cells beyond
// the numbered ones count as the last.
#pragma once

#include <cstdint>

#include "../core/config.h"

namespace kinml::cuda {

// Atoms in the order of their cells.
struct Cells {
  const std::int64_t* keys = nullptr;   // [n_atoms] in ascending order; null: there are no cells
  const std::int64_t* atoms = nullptr;  // [n_atoms] in the order of the keys
  double size = 0;
};

inline constexpr std::int64_t kCellsOfAxis = std::int64_t(1) << 14;
inline constexpr int kCellRanges = 9;  // of adjacent cells, those along z being one range

KINML_HD double cell_size(double longer_cutoff) {
  return longer_cutoff * 1.001;
}
// NaN: 0.
KINML_HD std::int64_t cell_of(double x, double size) {
  const double place = x / size + static_cast<double>(kCellsOfAxis / 2);
  if (!(place >= 0)) return 0;
  const double last = static_cast<double>(kCellsOfAxis - 1);
  return place < last ? static_cast<std::int64_t>(place) : kCellsOfAxis - 1;
}
// Key of a cell: sorted by structure, x, y, z.
KINML_HD std::int64_t cell_key(std::int64_t structure, std::int64_t cx, std::int64_t cy,
                               std::int64_t cz) {
  return ((structure * kCellsOfAxis + cx) * kCellsOfAxis + cy) * kCellsOfAxis + cz;
}
// First key of the i-th range of a centre in cell (cx, cy, cz), or the key behind its last; both
// are the same where the grid ends.
KINML_HD std::int64_t range_key(std::int64_t structure, std::int64_t cx, std::int64_t cy,
                                std::int64_t cz, int i, bool behind) {
  cx += i / 3 - 1;
  cy += i % 3 - 1;
  if (cx < 0 || cy < 0 || cx >= kCellsOfAxis || cy >= kCellsOfAxis) return 0;
  if (behind) return cell_key(structure, cx, cy, cz + 1 < kCellsOfAxis ? cz + 1 : cz) + 1;
  return cell_key(structure, cx, cy, cz > 0 ? cz - 1 : 0);
}
// How many of the sorted keys are less than key.
KINML_HD std::int64_t lower_bound(const std::int64_t* keys, std::int64_t n, std::int64_t key) {
  std::int64_t low = 0;
  while (n > 0) {
    const std::int64_t half = n / 2;
    if (keys[low + half] < key) {
      low += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return low;
}
// The structure of an atom: offsets[s] <= atom < offsets[s + 1].
KINML_HD std::int64_t structure_of(const std::int64_t* offsets, std::int64_t n_structures,
                                   std::int64_t atom) {
  return lower_bound(offsets, n_structures + 1, atom + 1) - 1;
}

}  // namespace kinml::cuda

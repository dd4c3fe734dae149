// Cells of periodic structures, as pairs.h needs them to look for images: prepared once for all
// centres.
//
// Of the difference d of two atoms, with fractional coordinates f, the images d + n cell within the
// reach have n_k in [-reach/height_k - f_k, reach/height_k - f_k], an interval with at most `counts[k]`
// integers: one if the cell is higher than twice the reach. So coordinates may be unwrapped.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/lattice.h"
#include "../core/system.h"
#include "group.h"
#include "launch.h"

namespace kinml::cuda {

struct ImageCell {
  Lattice lattice;
  double reach[3];  // in cells
  int counts[3];    // images of an atom along each vector that are tried
  int images;       // their product
  bool valid;       // else all displacements are NaN

  KINML_HD ImageCell(const double* cell, const std::int64_t* along, double longer_cutoff)
      : lattice(cell, along), valid(lattice.volume > 0) {
    for (int k = 0; k < 3; ++k) valid = valid && lattice.heights[k] >= kLowestCell;
    images = 1;
    for (int k = 0; k < 3; ++k) {
      const bool some = valid && lattice.periodic[k];
      reach[k] = some ? longer_cutoff / lattice.heights[k] * (1 + 1e-9) + 1e-9 : 0.0;
      counts[k] = some ? static_cast<int>(2 * reach[k]) + 1 : 1;
      images *= counts[k];
    }
  }

  // To d [3] the translation of image q is added; whether there is one.
  KINML_HD bool translate(int q, double* d) const {
    double n[3];
    for (int k = 0; k < 3; ++k) {
      const double f = lattice.fraction(k, d[0], d[1], d[2]);
      n[k] = lattice.periodic[k] ? std::ceil(-reach[k] - f) + q % counts[k] : 0.0;
      q /= counts[k];
    }
    for (int k = 0; k < 3; ++k) d[k] += lattice.translation(k, n);
    return n[0] != 0 || n[1] != 0 || n[2] != 0;
  }
};

template <class T>
struct ImageKernel {
  static constexpr int kThreads = 128;
  System<T> system;
  double longer_cutoff;
  ImageCell* cells;  // [n_structures]

  KINML_DEVICE void operator()(const Block& block) const {
    each_in_grid(block, system.n_structures, [&](std::int64_t s) {
      cells[s] = ImageCell(system.cells + 9 * s, system.periodic + 3 * s, longer_cutoff);
    });
  }
};

// Whether structures of a system have image cells.
template <class T>
KINML_HD bool has_images(const System<T>& system) {
  return system.cells != nullptr && system.pair_starts == nullptr;
}

}  // namespace kinml::cuda

// Lattice: the cell of a structure that is periodic along some of its vectors.
#pragma once

#include <cmath>
#include <cstdint>

#include "config.h"

namespace kinml {
inline namespace KINML_ISA {

// Cells whose opposite faces are nearer than this bring atoms onto their own images, angstrom.
inline constexpr double kLowestCell = 0.1;

// Of a cell [3, 3].
KINML_HD double cell_volume(const double* cell) {
  double volume = 0;
  for (int k = 0; k < 3; ++k) {
    const double *const a = cell + 3 + (k + 1) % 3, *const b = cell + 3 + (k + 2) % 3;
    volume += cell[k] * (a[0] * b[3] - b[0] * a[3]);
  }
  return std::fabs(volume);
}

// Vectors along which there is no periodicity are replaced by unit vectors perpendicular to the
// others, so that every place has fractional coordinates and the cell a volume.
struct Lattice {
  double vectors[3][3];  // rows, angstrom
  double inverse[3][3];  // x = f vectors, f = x inverse
  double heights[3];     // distances of opposite faces, angstrom
  double volume;         // the determinant; negative for left-handed vectors
  bool periodic[3];

  // cell  // [3, 3] rows are vectors; those of directions without periodicity are not read
  // along // [3] not 0: periodic
  KINML_HD Lattice(const double* cell, const std::int64_t* along) {
    int count = 0, some = 0;
    for (int k = 0; k < 3; ++k) {
      periodic[k] = along[k] != 0;
      count += periodic[k];
      for (int d = 0; d < 3; ++d) vectors[k][d] = periodic[k] ? cell[3 * k + d] : 0.0;
    }
    for (int k = 0; k < 3; ++k)
      if (periodic[k] == (count < 2)) some = k;  // the one that is, or is not, like no other
    double* const first = vectors[some];
    double* const second = vectors[(some + 1) % 3];
    double* const third = vectors[(some + 2) % 3];
    if (count == 0) {
      for (int k = 0; k < 3; ++k) vectors[k][k] = 1;
    } else if (count == 1) {
      int least = 0;
      for (int d = 1; d < 3; ++d)
        if (std::fabs(first[d]) < std::fabs(first[least])) least = d;
      double axis[3] = {0, 0, 0};
      axis[least] = 1;
      unit_cross(first, axis, second);
      unit_cross(first, second, third);
    } else if (count == 2) {
      unit_cross(second, third, first);
    }
    double faces[3][3];
    for (int k = 0; k < 3; ++k) cross(vectors[(k + 1) % 3], vectors[(k + 2) % 3], faces[k]);
    volume = dot(vectors[0], faces[0]);
    for (int k = 0; k < 3; ++k) {
      heights[k] = std::fabs(volume) / std::sqrt(dot(faces[k], faces[k]));
      for (int d = 0; d < 3; ++d) inverse[d][k] = faces[k][d] / volume;
    }
  }

  KINML_HD bool any() const { return periodic[0] || periodic[1] || periodic[2]; }
  KINML_HD double fraction(int k, double x, double y, double z) const {
    return x * inverse[0][k] + y * inverse[1][k] + z * inverse[2][k];
  }
  // Component d of the translation by n [3] cells.
  KINML_HD double translation(int d, const double* n) const {
    return n[0] * vectors[0][d] + n[1] * vectors[1][d] + n[2] * vectors[2][d];
  }

 private:
  static KINML_HD double dot(const double* a, const double* b) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
  }
  static KINML_HD void cross(const double* a, const double* b, double* out) {
    for (int d = 0; d < 3; ++d) {
      const int e = (d + 1) % 3, f = (d + 2) % 3;
      out[d] = a[e] * b[f] - a[f] * b[e];
    }
  }
  static KINML_HD void unit_cross(const double* a, const double* b, double* out) {
    cross(a, b, out);
    const double length = std::sqrt(dot(out, out));
    for (int d = 0; d < 3; ++d) out[d] /= length;
  }
};

}  // namespace KINML_ISA
}  // namespace kinml

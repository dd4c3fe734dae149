// The parameters of atomic environment vectors as kernels take them, and the numbers N that vectors
// are computed with: T, or Dual<T> for a derivative along a direction of the coordinates.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../core/dual.h"
#include "../core/gaussian.h"
#include "../core/model.h"
#include "group.h"
#include "launch.h"

namespace kinml::cuda {

// ---- numbers ------------------------------------------------------------------------------------

namespace aev_detail {

template <class T>
inline constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
// Squares of smaller distances are 0.
template <class T>
inline constexpr T kTiny = std::numeric_limits<T>::min();
// Square of the sine of a smaller angle.
template <class T>
inline constexpr T kSmallest = T(16) * std::numeric_limits<T>::epsilon();

template <class N>
struct Plain {
  using type = N;
};
template <class T>
struct Plain<Dual<T>> {
  using type = T;
};

template <class T>
KINML_HD T scale(T a, T x) {
  return a * x;
}
template <class T>
KINML_HD Dual<T> scale(T a, Dual<T> x) {
  return {a * x.value, a * x.tangent};
}
// x^y
template <class T>
KINML_HD T power(T x, T y) {
  return std::exp(y * std::log(x));
}
template <class T>
KINML_HD Dual<T> power(Dual<T> x, T y) {
  const T p = power(x.value, y);
  return {p, y * p / x.value * x.tangent};
}
// The part that a row consists of.
template <class T>
KINML_HD T result(T x) {
  return x;
}
template <class T>
KINML_HD T result(Dual<T> x) {
  return x.tangent;
}

}  // namespace aev_detail

template <class N>
using PlainOf = typename aev_detail::Plain<N>::type;

// ---- parameters ---------------------------------------------------------------------------------

inline constexpr int kMaxShifts = 64;  // numbers of each list

template <class T>
struct AevScales : AevNumbers<T> {
  T radial_root_eta, angular_root_eta;
};

// Argument of a kernel.
template <class T>
struct AevArguments : AevScales<T> {
  T radial_shifts[kMaxShifts];
  T angular_shifts[kMaxShifts];
  T section_cos[kMaxShifts];
  T section_sin[kMaxShifts];
};

template <class T>
AevArguments<T> aev_arguments(const AevParameters& p) {
  for (const auto* list : {&p.radial_shifts, &p.angular_shifts, &p.sections})
    if (list->size() > static_cast<std::size_t>(kMaxShifts))
      throw Error("an AEV on a GPU may have up to " + std::to_string(kMaxShifts) +
                  " radial shifts, angular shifts and sections each, not " +
                  std::to_string(list->size()) + ".");
  AevArguments<T> a{};
  static_cast<AevNumbers<T>&>(a) = aev_numbers<T>(p);
  a.radial_root_eta = static_cast<T>(std::sqrt(p.radial_eta));
  a.angular_root_eta = static_cast<T>(std::sqrt(p.angular_eta));
  for (int l = 0; l < a.n_radial; ++l) a.radial_shifts[l] = static_cast<T>(p.radial_shifts[l]);
  for (int l = 0; l < a.n_angular; ++l) a.angular_shifts[l] = static_cast<T>(p.angular_shifts[l]);
  for (int m = 0; m < a.n_sections; ++m) {
    a.section_cos[m] = static_cast<T>(std::cos(p.sections[m]));
    a.section_sin[m] = static_cast<T>(std::sin(p.sections[m]));
  }
  return a;
}

// The same with the lists in the block's memory, where lanes may read different numbers at once.
template <class T>
struct AevTables : AevScales<T> {
  T* radial_shifts;   // [n_radial]
  T* angular_shifts;  // [n_angular]
  T* section_cos;     // [n_sections]
  T* section_sin;     // [n_sections]
};

template <class T>
KINML_HD AevTables<T> take_aev_tables(Pieces& pieces, const AevArguments<T>& a) {
  AevTables<T> t;
  static_cast<AevScales<T>&>(t) = a;
  t.radial_shifts = pieces.take<T>(a.n_radial);
  t.angular_shifts = pieces.take<T>(a.n_angular);
  t.section_cos = pieces.take<T>(a.n_sections);
  t.section_sin = pieces.take<T>(a.n_sections);
  return t;
}
template <class T>
KINML_HD std::int64_t aev_tables_bytes(const AevArguments<T>& a) {
  Pieces pieces(nullptr);
  take_aev_tables(pieces, a);
  return pieces.taken();
}
// Takes and fills them: one step of the block.
template <class T>
KINML_DEVICE AevTables<T> aev_tables(const Block& block, const AevArguments<T>& a, Pieces& pieces) {
  const AevTables<T> t = take_aev_tables(pieces, a);
  block.each(kMaxShifts, [&](int i) {
    if (i < t.n_radial) t.radial_shifts[i] = a.radial_shifts[i];
    if (i < t.n_angular) t.angular_shifts[i] = a.angular_shifts[i];
    if (i < t.n_sections) {
      t.section_cos[i] = a.section_cos[i];
      t.section_sin[i] = a.section_sin[i];
    }
  });
  return t;
}

}  // namespace kinml::cuda

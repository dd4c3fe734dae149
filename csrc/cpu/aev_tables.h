// The tables of aev_kernels.h, made from the parameters of a model.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/model.h"
#include "aev_kernels.h"

namespace kinml::cpu {

// Parameters in the type of the computation, padded for whole registers.
template <class T>
struct AevTableStorage : AevTables<T> {
  std::vector<T> storage;

  explicit AevTableStorage(const AevParameters& p) {
    static_cast<AevNumbers<T>&>(*this) = aev_numbers<T>(p);
    this->angular_step = static_cast<T>(even_step(p));
    this->angular_shrink =
        static_cast<T>(std::exp(-2 * p.angular_eta * even_step(p) * even_step(p)));
    std::vector<double> cosines, sines;
    for (const double alpha : p.sections) {
      cosines.push_back(std::cos(alpha));
      sines.push_back(std::sin(alpha));
    }
    const std::vector<double>* lists[] = {&p.radial_shifts, &p.angular_shifts, &cosines, &sines};
    const T** places[] = {&this->radial_shifts, &this->angular_shifts, &this->section_cos,
                          &this->section_sin};
    std::size_t starts[4];
    for (int i = 0; i < 4; ++i) {
      starts[i] = storage.size();
      for (const double x : *lists[i]) storage.push_back(static_cast<T>(x));
      while (storage.size() % kMaxLanes != 0) storage.push_back(storage.back());
    }
    for (int i = 0; i < 4; ++i) *places[i] = storage.data() + starts[i];
  }

 private:
  // The distance of evenly spaced angular shifts, or 0: they are not, or the gaussian of the middle
  // one leaves the range of T within the cutoff.
  static double even_step(const AevParameters& p) {
    const std::vector<double>& shifts = p.angular_shifts;
    if (shifts.empty()) return 0.0;  // of a repulsion alone
    const double step = shifts.size() > 1 ? shifts[1] - shifts[0] : 0.0;
    for (std::size_t l = 1; l < shifts.size(); ++l)
      if (std::abs(shifts[l] - shifts[0] - l * step) > 1e-12 * p.angular_cutoff) return 0.0;
    const double middle = shifts[shifts.size() / 2];
    const double farthest = std::max(std::abs(middle), std::abs(p.angular_cutoff - middle));
    const double limit = sizeof(T) == 8 ? 500.0 : 50.0;
    const bool inside =
        p.angular_eta * farthest * farthest < limit && 2 * p.angular_eta * step * farthest < limit;
    return step > 0 && inside ? step : 0.0;
  }
};

}  // namespace kinml::cpu

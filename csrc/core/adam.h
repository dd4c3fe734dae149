// One step of Adam or AdamW. Source: Kingma, Ba, ICLR 2015 (arXiv 1412.6980); Loshchilov, Hutter,
// ICLR 2019 (arXiv 1711.05101); AMSGrad: Reddi, Kale, Kumar, ICLR 2018.
//
//   g += weight_decay p            (Adam)      or   p -= lr weight_decay p   (AdamW)
//   m += (1 - beta1) (g - m)       v += (1 - beta2) (g^2 - v)
//   p -= lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
//
// With amsgrad the largest v so far takes the place of v in the last line.
#pragma once

#include <cmath>
#include <cstdint>

#include "activation.h"
#include "config.h"

namespace kinml {

struct AdamSettings {
  double learning_rate, beta1, beta2, eps, weight_decay;
  bool decoupled;     // AdamW
  std::int64_t step;  // number of this step, from 1
};

// The numbers of a step, worked out once.
template <class T>
struct AdamFactors {
  T shrink;   // 1 - lr weight_decay (AdamW), else 1
  T penalty;  // weight_decay (Adam), else 0
  T one_minus_beta1, one_minus_beta2;
  T step_size;        // lr / (1 - beta1^step)
  T root_correction;  // 1 / sqrt(1 - beta2^step)
  T eps;
};

inline namespace KINML_ISA {

// Worked out in double, by whoever starts the step.
template <class T>
KINML_HD AdamFactors<T> adam_factors(const AdamSettings& s) {
  const double step = static_cast<double>(s.step);
  return {static_cast<T>(s.decoupled ? 1 - s.learning_rate * s.weight_decay : 1.0),
          static_cast<T>(s.decoupled ? 0.0 : s.weight_decay),
          static_cast<T>(1 - s.beta1),
          static_cast<T>(1 - s.beta2),
          static_cast<T>(s.learning_rate / (1 - std::pow(s.beta1, step))),
          static_cast<T>(1 / std::sqrt(1 - std::pow(s.beta2, step))),
          static_cast<T>(s.eps)};
}

// Parameter p, mean m and square v of a gradient g; largest: null without amsgrad. V is a number or
// a register of numbers T.
template <class T, class V>
KINML_HD void adam_update(const AdamFactors<T>& f, V& p, V g, V& m, V& v, V* largest) {
  using std::sqrt;
  p = p * V(f.shrink);
  g = g + V(f.penalty) * p;
  m = m + V(f.one_minus_beta1) * (g - m);
  v = v + V(f.one_minus_beta2) * (g * g - v);
  V second = v;
  if (largest != nullptr) second = *largest = select_ge(*largest, v, *largest, v);
  p = p - V(f.step_size) * m / (sqrt(second) * V(f.root_correction) + V(f.eps));
}

}  // namespace KINML_ISA
}  // namespace kinml

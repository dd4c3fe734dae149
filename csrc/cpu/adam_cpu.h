// One step of Adam or AdamW on a flat tensor. Source: Kingma, Ba, ICLR 2015 (arXiv 1412.6980);
// Loshchilov, Hutter, ICLR 2019 (arXiv 1711.05101); AMSGrad: Reddi, Kale, Kumar, ICLR 2018.
//
//   g += weight_decay p            (Adam)      or   p -= lr weight_decay p   (AdamW)
//   m += (1 - beta1) (g - m)       v += (1 - beta2) (g^2 - v)
//   p -= lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
//
// With amsgrad the largest v so far takes the place of v in the last line.
#pragma once

#include <cstdint>

namespace kinml::cpu {

struct AdamSettings {
  double learning_rate, beta1, beta2, eps, weight_decay;
  bool decoupled;     // AdamW
  std::int64_t step;  // number of this step, from 1
};

// parameter, mean, square, largest (null without amsgrad): [n], updated; gradient: [n].
// The same bits for any n_threads.
template <class T>
void adam_step(const AdamSettings& settings, std::int64_t n, T* parameter, const T* gradient,
               T* mean, T* square, T* largest, int n_threads);

}  // namespace kinml::cpu

#include "adam_cuda.h"

#include <algorithm>

namespace kinml::cuda {
namespace {

// More blocks than any GPU runs at a time; the rest of a long tensor is taken in further rounds.
constexpr std::int64_t kMostBlocks = 2048;

template <class T>
struct AdamStep {
  static constexpr int kThreads = 256;

  AdamSettings settings;
  const double* steps;  // [1]
  std::int64_t n, blocks;
  T* parameter;       // [n]
  const T* gradient;  // [n]
  AdamMoments<T> moments;

  KINML_DEVICE void operator()(const Block& block) const {
    AdamFactors<T>& factors = *reinterpret_cast<AdamFactors<T>*>(block.memory());
    block.each(1, [&](int) {
      AdamSettings numbered = settings;
      numbered.step = static_cast<std::int64_t>(*steps) + 1;
      factors = adam_factors<T>(numbered);
    });
    for (std::int64_t first = std::int64_t{block.index()} * kThreads; first < n;
         first += blocks * kThreads) {
      const std::int64_t left = n - first;
      block.each(left < kThreads ? static_cast<int>(left) : kThreads, [&](int k) {
        const std::int64_t i = first + k;
        const auto& [mean, square, largest] = moments;
        T p = parameter[i], m = mean[i], v = square[i];
        T most = largest == nullptr ? T(0) : largest[i];
        adam_update(factors, p, gradient[i], m, v, largest == nullptr ? nullptr : &most);
        parameter[i] = p;
        mean[i] = m;
        square[i] = v;
        if (largest != nullptr) largest[i] = most;
      });
    }
  }
};

// Behind the step, whose blocks have all read the number.
struct CountStep {
  static constexpr int kThreads = 32;
  double* steps;  // [1]

  KINML_DEVICE void operator()(const Block& block) const {
    block.each(1, [&](int) { *steps += 1; });
  }
};

}  // namespace

template <class T>
void adam_step(const AdamSettings& settings, double* steps, std::int64_t n, T* parameter,
               const T* gradient, const AdamMoments<T>& moments, Stream stream) {
  const std::int64_t blocks = std::min(kMostBlocks, blocks_for(n, AdamStep<T>::kThreads));
  launch(AdamStep<T>{settings, steps, n, blocks, parameter, gradient, moments}, blocks, stream,
         {(sizeof(AdamFactors<T>) + 15) / 16 * 16});
  launch(CountStep{steps}, 1, stream);
}

template void adam_step<double>(const AdamSettings&, double*, std::int64_t, double*, const double*,
                                const AdamMoments<double>&, Stream);
template void adam_step<float>(const AdamSettings&, double*, std::int64_t, float*, const float*,
                               const AdamMoments<float>&, Stream);

}  // namespace kinml::cuda

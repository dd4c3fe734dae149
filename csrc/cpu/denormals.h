// Flushing of denormal numbers in float32.
//
// The tails of gaussians leave the normal range of float32, and arithmetic with denormal numbers
// costs a hundred cycles each on many processors: a float32 pass was slower than the float64 one.
// While a FlushDenormals<float> lives, its thread counts them as zero (an absolute error below
// 1.2e-38); float64 is left alone.
#pragma once

#include "../core/config.h"

namespace kinml {
inline namespace KINML_ISA {

template <class T>
class FlushDenormals {
 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
#if defined(__x86_64__)
  KINML_HD FlushDenormals() : before_(__builtin_ia32_stmxcsr()) {
    if constexpr (sizeof(T) == 4)
      __builtin_ia32_ldmxcsr(before_ | kFlushToZero | kDenormalsAreZero);
  }
  KINML_HD ~FlushDenormals() {
    if constexpr (sizeof(T) == 4) __builtin_ia32_ldmxcsr(before_);
  }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  unsigned before_;
#else
  KINML_HD FlushDenormals() {}
  KINML_HD ~FlushDenormals() {}
#endif
};

}  // namespace KINML_ISA
}  // namespace kinml

// Run-time choice of the instruction set.
//
// A file <topic>_kernels.cpp is compiled once per instruction set, each time with another
// KINML_ISA, so its functions exist as kinml::baseline::f, kinml::avx2::f and kinml::avx512::f. The
// file <topic>_cpu.cpp, compiled once for any processor, declares the three with
// KINML_DECLARE_KERNEL and calls the best one that this processor runs with KINML_CALL_KERNEL.
#pragma once

#include "../core/config.h"

namespace kinml::cpu {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The instruction set in use: the best of the processor, or a lower one named by the environment
// variable KINML_CPU_ISA (baseline, avx2, avx512). Chosen at the first call.
Isa isa();
const char* isa_name();

}  // namespace kinml::cpu

#if defined(__x86_64__)
#define KINML_DECLARE_KERNEL(result, name, ...) \
  namespace baseline {                          \
  result name(__VA_ARGS__);                     \
  }                                             \
  namespace avx2 {                              \
  result name(__VA_ARGS__);                     \
  }                                             \
  namespace avx512 {                            \
  result name(__VA_ARGS__);                     \
  }
#define KINML_CALL_KERNEL(name, ...)                                                     \
  (::kinml::cpu::isa() == ::kinml::cpu::Isa::avx512 ? ::kinml::avx512::name(__VA_ARGS__) \
   : ::kinml::cpu::isa() == ::kinml::cpu::Isa::avx2 ? ::kinml::avx2::name(__VA_ARGS__)   \
                                                    : ::kinml::baseline::name(__VA_ARGS__))
#else
#define KINML_DECLARE_KERNEL(result, name, ...) \
  namespace baseline {                          \
  result name(__VA_ARGS__);                     \
  }
#define KINML_CALL_KERNEL(name, ...) ::kinml::baseline::name(__VA_ARGS__)
#endif

#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace kinml::cpu {

namespace {

Isa best_of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose() {
  const Isa best = best_of_processor();
  const char* wish = std::getenv("KINML_CPU_ISA");
  if (wish == nullptr) return best;
  Isa wanted = best;
  if (std::strcmp(wish, "baseline") == 0) wanted = Isa::baseline;
  if (std::strcmp(wish, "avx2") == 0) wanted = Isa::avx2;
  return wanted < best ? wanted : best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace kinml::cpu

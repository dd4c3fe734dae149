// The smallest test harness that does: CHECK macros that count, and a summary.
//
//   int main() {
//     check::section("sums");
//     CHECK(1 + 1 == 2);
//     CHECK_CLOSE(sum(x), 3.0, 1e-12, 0.0);  // |a - b| <= rtol |b| + atol
//     return check::finish();
//   }
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace check {

// Whether to leave out what takes long: compute-sanitizer runs the program (scripts/gpu_check.sh).
inline bool short_run() {
  const char* wish = std::getenv("KINML_SHORT_TESTS");
  return wish != nullptr && *wish == '1';
}

inline long passed = 0;
inline long failed = 0;
inline const char* current = "";
inline constexpr long kShown = 50;  // failures that are printed

// Name printed with the failures that follow.
inline void section(const char* name) {
  current = name;
}

inline void record(bool good, const char* file, int line, const char* text) {
  if (good) {
    ++passed;
    return;
  }
  if (++failed <= kShown) std::printf("%s:%d: [%s] %s\n", file, line, current, text);
}

inline void record_close(long double a, long double b, long double rtol, long double atol,
                         const char* file, int line, const char* text) {
  // Written so that a NaN fails.
  if (std::fabs(a - b) <= rtol * std::fabs(b) + atol) {
    ++passed;
    return;
  }
  if (++failed <= kShown)
    std::printf("%s:%d: [%s] %s: %.17Lg, expected %.17Lg\n", file, line, current, text, a, b);
}

// Prints the summary; the exit code of the program.
inline int finish() {
  std::printf("%ld passed, %ld failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) \
  ::check::record(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_CLOSE(a, b, rtol, atol) \
  ::check::record_close(a, b, rtol, atol, __FILE__, __LINE__, #a " close to " #b)

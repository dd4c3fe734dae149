// The one threading wrapper of the CPU code.
//
// Work is cut into items that do not depend on the number of threads, and every item writes its
// own output: so a result has the same bits for any number of threads.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace kinml::cpu {

// Index of the calling thread inside parallel_for, 0 outside of it: selects scratch memory.
static inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Calls function(item) once for each item in [0, n_items), on at most n_threads threads. Items are
// handed out one at a time, so uneven items balance. function must not throw.
template <class Function>
static inline void parallel_for(std::int64_t n_items, int n_threads, const Function& function) {
#if defined(_OPENMP)
  if (n_threads > 1 && n_items > 1 && !omp_in_parallel()) {
    const int team = n_threads < n_items ? n_threads : static_cast<int>(n_items);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (std::int64_t item = 0; item < n_items; ++item) function(item);
    return;
  }
#endif
  (void)n_threads;
  for (std::int64_t item = 0; item < n_items; ++item) function(item);
}

}  // namespace kinml::cpu

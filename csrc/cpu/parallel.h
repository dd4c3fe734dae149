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

// A thread's share of the items; a cache line each, so that threads do not disturb one another.
struct alignas(64) Share {
  std::int64_t next, end;
};
inline constexpr int kMaxShares = 256;

// Calls function(item) once for each item in [0, n_items), on at most n_threads threads. Each
// thread works through its own contiguous share, then takes what is left of the others':
// consecutive calls over the same data find it in the same core's cache, and uneven items balance.
// function must not throw.
template <class Function>
static inline void parallel_for(std::int64_t n_items, int n_threads, const Function& function) {
#if defined(_OPENMP)
  if (n_threads > 1 && n_items > 1 && !omp_in_parallel()) {
    int team = n_threads < n_items ? n_threads : static_cast<int>(n_items);
    if (team > kMaxShares) team = kMaxShares;
    Share shares[kMaxShares];
    for (int t = 0; t < team; ++t) shares[t] = {n_items * t / team, n_items * (t + 1) / team};
#pragma omp parallel num_threads(team)
    {
      const int thread = omp_get_thread_num();
      for (int other = 0; other < team; ++other) {
        Share& share = shares[(thread + other) % team];
        for (;;) {
          const std::int64_t item = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
          if (item >= share.end) break;
          function(item);
        }
      }
    }
    return;
  }
#endif
  (void)n_threads;
  for (std::int64_t item = 0; item < n_items; ++item) function(item);
}

}  // namespace kinml::cpu

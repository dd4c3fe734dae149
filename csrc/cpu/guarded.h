// parallel_for for work that allocates memory: an exception must not leave a parallel region, so
// std::bad_alloc is raised again behind it. (Kernels are compiled without exceptions.)
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "parallel.h"

namespace kinml::cpu {

template <class Function>
void guarded_parallel_for(std::int64_t n_items, int n_threads, const Function& function) {
  std::atomic<bool> out_of_memory{false};
  parallel_for(n_items, n_threads, [&](std::int64_t item) {
    try {
      function(item);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace kinml::cpu

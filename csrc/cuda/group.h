// Code for one group of GPU threads, in steps that end with a barrier.
//
// A kernel is a sequence of steps each(n, f): f(0), f(1) ... f(n - 1) run in any order and at the
// same time, what they wrote is seen by the next step, and no step's item reads what another item
// of it writes. A group is a warp or a block; sums are taken in the order of the items, so that
// results have the same bits whatever the number of threads.
//
// The same source is compiled for the host as well, without nvcc: there the items of a step run one
// after the other, in an order that a test chooses (StepOrder), in memory that begins as NaN and
// ends where the kernel said. With KINML_LANE_THREADS every lane is a thread (group_threads.h). What
// is left for the GPU alone to show is this file and launch.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/config.h"

#if defined(__CUDACC__)
#define KINML_DEVICE __device__ __forceinline__
#define KINML_ASIDE __device__ __noinline__
#else
#define KINML_DEVICE inline
#define KINML_ASIDE inline
#include <cstdlib>
#include <utility>
#include <vector>
#endif
#if defined(KINML_LANE_THREADS)
#include "group_threads.h"
#endif

namespace kinml::cuda {

#if defined(__CUDACC__)

// 32 threads.
class Warp {
 public:
  template <class F>
  KINML_DEVICE void each(int n, const F& f) const {
    for (int i = lane(); i < n; i += 32) f(i);
    __syncwarp();
  }
  // put(i, place) for the i with chosen(i), places 0, 1, ... in the order of i; returns how many.
  template <class Chosen, class Put>
  KINML_DEVICE int select(int n, const Chosen& chosen, const Put& put) const {
    int found = 0;
    for (int base = 0; base < n; base += 32) {
      const int i = base + lane();
      const bool mine = i < n && chosen(i);
      const unsigned mask = __ballot_sync(0xffffffffu, mine);
      if (mine) put(i, found + __popc(mask & ((1u << lane()) - 1)));
      found += __popc(mask);
    }
    __syncwarp();
    return found;
  }

 private:
  KINML_DEVICE int lane() const { return static_cast<int>(threadIdx.x % 32); }
};

class Block {
 public:
  KINML_DEVICE explicit Block(char* memory) : memory_(memory) {}

  KINML_DEVICE int index() const { return static_cast<int>(blockIdx.x); }
  KINML_DEVICE int threads() const { return static_cast<int>(blockDim.x); }
  KINML_DEVICE int warps() const { return threads() / 32; }
  // The block's own memory, aligned to 16 bytes; see launch.
  KINML_DEVICE char* memory() const { return memory_; }

  template <class F>
  KINML_DEVICE void each(int n, const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += threads()) f(i);
    __syncthreads();
  }
  // f(warp, number of the warp) for every warp, as one step. The warps do not see one another.
  template <class F>
  KINML_DEVICE void each_warp(const F& f) const {
    f(Warp(), static_cast<int>(threadIdx.x / 32));
    __syncthreads();
  }
  // From enter to leave no other block is between them with the same lock, which is 0 at first.
  KINML_DEVICE void enter(int* lock) const {
    if (threadIdx.x == 0) {
      while (atomicCAS(lock, 0, 1) != 0) __nanosleep(200);
      __threadfence();
    }
    __syncthreads();
  }
  KINML_DEVICE void leave(int* lock) const {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    atomicExch(lock, 0);
  }

 private:
  char* memory_;
};

#else

// The order in which the host runs the items of a step. A kernel whose items depend on one another
// gives other numbers in another order.
enum class StepOrder { forward, backward, shuffled };
inline StepOrder& step_order() {
  static StepOrder order = StepOrder::forward;
  return order;
}

#if !defined(KINML_LANE_THREADS)

template <class F>
void run_step(int n, const F& f) {
  switch (step_order()) {
    case StepOrder::forward:
      for (int i = 0; i < n; ++i) f(i);
      break;
    case StepOrder::backward:
      for (int i = n; i-- > 0;) f(i);
      break;
    case StepOrder::shuffled:
      if (n > 0) {
        static std::uint32_t state = 1;
        std::vector<int> items(static_cast<std::size_t>(n));
        for (int i = 0; i < n; ++i) items[static_cast<std::size_t>(i)] = i;
        for (int i = n - 1; i > 0; --i) {
          state = state * 1664525u + 1013904223u;
          std::swap(items[static_cast<std::size_t>(i)],
                    items[static_cast<std::size_t>(state >> 8) % static_cast<std::size_t>(i + 1)]);
        }
        for (const int i : items) f(i);
      }
      break;
  }
}

class Warp {
 public:
  template <class F>
  void each(int n, const F& f) const {
    run_step(n, f);
  }
  template <class Chosen, class Put>
  int select(int n, const Chosen& chosen, const Put& put) const {
    int found = 0;
    for (int i = 0; i < n; ++i)
      if (chosen(i)) put(i, found++);
    return found;
  }
};

class Block {
 public:
  Block(int index, int threads, char* memory) : index_(index), threads_(threads), memory_(memory) {}

  int index() const { return index_; }
  int threads() const { return threads_; }
  int warps() const { return threads_ / 32; }
  char* memory() const { return memory_; }

  template <class F>
  void each(int n, const F& f) const {
    run_step(n, f);
  }
  template <class F>
  void each_warp(const F& f) const {
    run_step(warps(), [&](int w) { f(Warp(), w); });
  }
  // Blocks run one after the other: somebody has forgotten to leave, or to clear it.
  void enter(int* lock) const {
    if (*lock != 0) std::abort();
    *lock = 1;
  }
  void leave(int* lock) const { *lock = 0; }

 private:
  int index_, threads_;
  char* memory_;
};

#endif
#endif

// f(memory) by a call of its own, for what is rare: its code does not stand among what is not, and
// memory elsewhere does not hide from the compiler where that of the usual case is. It is given
// copies, so that nothing else must have an address.
template <class F, class Memory>
KINML_ASIDE auto aside(F f, Memory memory) {
  return f(memory);
}

// f(i) for n items, of which each block of a grid of blocks_for(n, threads) takes as many as it has
// threads.
template <class F>
KINML_DEVICE void each_in_grid(const Block& block, std::int64_t n, const F& f) {
  const std::int64_t first = std::int64_t(block.index()) * block.threads(), left = n - first;
  block.each(left < block.threads() ? static_cast<int>(left) : block.threads(),
             [&](int item) { f(first + item); });
}
KINML_HD std::int64_t blocks_for(std::int64_t n, int threads) {
  return (n + threads - 1) / threads;
}

// total = term(0) + ... + term(n - 1), by a block in a fixed order: of lanes, then over these.
// lanes  // [block.threads()]
template <class Term>
KINML_DEVICE void sum_in_block(const Block& block, std::int64_t n, const Term& term, double* lanes,
                               double& total) {
  const int some = n < block.threads() ? static_cast<int>(n) : block.threads();
  block.each(some, [&](int lane) {
    double sum = 0;
    for (std::int64_t i = lane; i < n; i += block.threads()) sum += term(i);
    lanes[lane] = sum;
  });
  block.each(1, [&](int) {
    double sum = 0;
    for (int lane = 0; lane < some; ++lane) sum += lanes[lane];
    total = sum;
  });
}

// Takes aligned pieces of a block's or a warp's memory; with begin = null it counts how much a
// kernel takes, so that the count and the use are one function.
class Pieces {
 public:
  KINML_HD explicit Pieces(char* begin) : next_(begin), taken_(0) {}

  template <class N>
  KINML_HD N* take(std::int64_t n) {
    N* const piece = reinterpret_cast<N*>(next_ == nullptr ? nullptr : next_ + taken_);
    taken_ += (n * static_cast<std::int64_t>(sizeof(N)) + 15) / 16 * 16;
    return piece;
  }
  KINML_HD std::int64_t taken() const { return taken_; }

 private:
  char* next_;
  std::int64_t taken_;
};

}  // namespace kinml::cuda

#include "sort.h"

#if defined(__CUDACC__)
#define NVTX_DISABLE  // no ranges for profilers, whose code is looked for when a program begins
#include <cub/device/device_radix_sort.cuh>
#else
#include <algorithm>
#include <numeric>
#endif

namespace kinml::cuda {

#if defined(__CUDACC__)

namespace {

using Index = std::int64_t;

struct PlacesKernel {
  static constexpr int kThreads = 256;
  Index n;
  Index* places;  // [n]

  KINML_DEVICE void operator()(const Block& block) const {
    each_in_grid(block, n, [&](Index i) { places[i] = i; });
  }
};

void check(cudaError_t error) {
  if (error != cudaSuccess) throw_launch_error(static_cast<int>(error));
}

// Cuts a workspace, or counts what it takes.
struct SortMemory {
  Index* places;
  char* scratch;
  std::size_t scratch_bytes = 0;
  Index bytes;

  SortMemory(Index n, char* workspace) {
    constexpr Index* nothing = nullptr;
    check(cub::DeviceRadixSort::SortPairs(nullptr, scratch_bytes, nothing, nothing, nothing,
                                          nothing, n));
    Pieces pieces(workspace);
    places = pieces.take<Index>(n);
    scratch = pieces.take<char>(static_cast<Index>(scratch_bytes));
    bytes = pieces.taken();
  }
};

}  // namespace

std::int64_t sort_workspace(std::int64_t n) {
  return SortMemory(n, nullptr).bytes;
}

void sort_keys(const std::int64_t* keys, std::int64_t n, std::int64_t* sorted, std::int64_t* order,
               char* workspace, Stream stream) {
  SortMemory memory(n, workspace);
  const PlacesKernel kernel{n, memory.places};
  launch(kernel, blocks_for(n, kernel.kThreads), stream);
  check(cub::DeviceRadixSort::SortPairs(memory.scratch, memory.scratch_bytes, keys, sorted,
                                        static_cast<const Index*>(memory.places), order, n, 0, 64,
                                        static_cast<cudaStream_t>(stream)));
}

#else

std::int64_t sort_workspace(std::int64_t) {
  return 0;
}

void sort_keys(const std::int64_t* keys, std::int64_t n, std::int64_t* sorted, std::int64_t* order,
               char*, Stream) {
  std::iota(order, order + n, std::int64_t{0});
  std::stable_sort(order, order + n,
                   [&](std::int64_t a, std::int64_t b) { return keys[a] < keys[b]; });
  std::transform(order, order + n, sorted, [&](std::int64_t i) { return keys[i]; });
}

#endif

}  // namespace kinml::cuda

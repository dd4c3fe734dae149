// Starts kernels: on a stream of the GPU or, compiled without nvcc, on the host (group.h).
//
// A kernel is a struct of arguments with
//   static constexpr int kThreads       threads of a block, a multiple of 32
//   static constexpr int kBlocks        blocks of a multiprocessor at one time for which there must
//                                       be registers; 1 if not given, so that none are spilled
//   KINML_DEVICE void operator()(const Block& block) const
// It is passed by value: at most 32,764 bytes (4,096 before CUDA 12.1).
#pragma once

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "group.h"

namespace kinml::cuda {

using Stream = void*;  // cudaStream_t

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory of the blocks of a kernel that may be elsewhere than on the chip: there, or pieces of `bytes`
// from `global` on, of which the i-th is that of the i-th block. `bytes` is a multiple of 16.
struct BlockMemory {
  std::int64_t bytes = 0;
  char* global = nullptr;
};

// The most memory on the chip that a block may have, and the number of multiprocessors, of the
// current device. Throws Error, with what is wrong with the device or driver.
struct Device {
  std::int64_t block_memory;
  int multiprocessors;
};
Device current_device();
// For tests: what current_device says from now on, e.g. less memory than there is; null: the truth.
void pretend_device(const Device* device);

#if defined(__CUDACC__)

// Throws Error for a code of the CUDA runtime other than cudaSuccess.
[[noreturn]] void throw_launch_error(int code);

template <class Kernel>
constexpr int blocks_at_once() {
  if constexpr (requires { Kernel::kBlocks; })
    return Kernel::kBlocks;
  else
    return 1;
}

// With the memory of blocks on the chip, which the compiler then knows.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, blocks_at_once<Kernel>())
    run(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) char on_chip[];
  kernel(Block(on_chip));
}
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, blocks_at_once<Kernel>())
    run(const __grid_constant__ Kernel kernel, char* global, std::int64_t bytes) {
  extern __shared__ __align__(16) char on_chip[];
  kernel(Block(global == nullptr ? on_chip : global + blockIdx.x * bytes));
}

// Lets a function have all the memory on the chip that a device gives to a block: once for each
// device, since it is the state of the function, which several threads of the host may launch.
class AllMemory {
 public:
  template <class Function>
  cudaError_t allow(Function* function) {
    int device = 0, bytes = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place = static_cast<std::size_t>(device);
    if (place >= done_.size()) done_.resize(place + 1, false);
    if (done_[place]) return cudaSuccess;
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    done_[place] = error == cudaSuccess;
    return error;
  }

 private:
  std::mutex mutex_;
  std::vector<bool> done_;
};

template <class Kernel, class... Arguments>
void start(void (*function)(Kernel, Arguments...), std::int64_t blocks, std::int64_t on_chip,
           Stream stream, const Kernel& kernel, const Arguments&... arguments) {
  static_assert(Kernel::kThreads % 32 == 0);
  if (blocks == 0) return;
  cudaError_t error = cudaSuccess;
  static AllMemory memory_of_function;
  if (on_chip > 48 * 1024) error = memory_of_function.allow(function);
  if (error == cudaSuccess) {
    function<<<static_cast<unsigned>(blocks), Kernel::kThreads, static_cast<std::size_t>(on_chip),
               static_cast<cudaStream_t>(stream)>>>(kernel, arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw_launch_error(static_cast<int>(error));
}
template <class Kernel>
void launch(const Kernel& kernel, std::int64_t blocks, Stream stream, std::int64_t on_chip = 0) {
  start<Kernel>(run<Kernel>, blocks, on_chip, stream, kernel);
}
template <class Kernel>
void launch(const Kernel& kernel, std::int64_t blocks, Stream stream, const BlockMemory& memory) {
  start<Kernel, char*, std::int64_t>(run<Kernel>, blocks,
                                     memory.global == nullptr ? memory.bytes : 0, stream, kernel,
                                     memory.global, memory.bytes);
}

#elif defined(KINML_LANE_THREADS)

template <class Kernel>
void launch(const Kernel& kernel, std::int64_t blocks, Stream, const BlockMemory& memory) {
  static_assert(Kernel::kThreads % 32 == 0);
  threads::Pool::all().run(
      static_cast<int>(blocks), memory.bytes,
      [&](threads::Lane& lane, int block) { kernel(Block(block, Kernel::kThreads, lane)); });
}

#else

// Host: `global` is not used, so that a block's memory is always new and a sanitizer sees its ends.
template <class Kernel>
void launch(const Kernel& kernel, std::int64_t blocks, Stream, const BlockMemory& memory) {
  static_assert(Kernel::kThreads % 32 == 0);
  run_step(static_cast<int>(blocks), [&](int i) {
    char* const on_chip = static_cast<char*>(std::malloc(static_cast<std::size_t>(memory.bytes)));
    for (std::int64_t b = 0; b < memory.bytes; ++b) on_chip[b] = static_cast<char>(0xff);
    kernel(Block(i, Kernel::kThreads, on_chip));
    std::free(on_chip);
  });
}

#endif
#if !defined(__CUDACC__)

template <class Kernel>
void launch(const Kernel& kernel, std::int64_t blocks, Stream stream, std::int64_t on_chip = 0) {
  launch(kernel, blocks, stream, BlockMemory{on_chip});
}

#endif

}  // namespace kinml::cuda

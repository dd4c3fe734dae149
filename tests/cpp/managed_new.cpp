// Lets a test written for the host run on a GPU: all memory of `new`, and so of std::vector and
// Guarded, is managed memory, which both see. The program is run with CUDA_LAUNCH_BLOCKING=1, so
// that results are there when a launcher returns. Memory on the stack is not seen by the GPU.
//
// Without a GPU the program ends at once with exit code 77 (skipped).
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace {

// In front of every piece, so that its end is the end of an allocation.
struct Head {
  std::uint64_t managed;
};
constexpr std::size_t kHead = 256;  // a multiple of every alignment in use

thread_local bool inside = false;  // what CUDA itself allocates is not for the GPU

void* allocate(std::size_t bytes) {
  void* piece = nullptr;
  bool managed = false;
  if (!inside) {
    inside = true;
    managed = cudaMallocManaged(&piece, kHead + bytes) == cudaSuccess;
    inside = false;
  }
  if (!managed) piece = std::aligned_alloc(kHead, (bytes + 2 * kHead - 1) / kHead * kHead);
  if (piece == nullptr) {
    std::fputs("out of memory\n", stderr);
    std::abort();
  }
  static_cast<Head*>(piece)->managed = managed ? 1 : 0;
  return static_cast<char*>(piece) + kHead;
}

void release(void* pointer) {
  if (pointer == nullptr) return;
  char* const piece = static_cast<char*>(pointer) - kHead;
  if (reinterpret_cast<Head*>(piece)->managed != 0)
    cudaFree(piece);
  else
    std::free(piece);
}

__attribute__((constructor)) void need_gpu() {
  int devices = 0;
  inside = true;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  inside = false;
  if (error == cudaSuccess && devices > 0) return;
  std::printf("skipped: no GPU (%s)\n", cudaGetErrorString(error));
  std::fflush(stdout);
  _exit(77);
}

}  // namespace

void* operator new(std::size_t bytes) {
  return allocate(bytes);
}
void* operator new[](std::size_t bytes) {
  return allocate(bytes);
}
void* operator new(std::size_t bytes, std::align_val_t) {
  return allocate(bytes);
}
void* operator new[](std::size_t bytes, std::align_val_t) {
  return allocate(bytes);
}
void operator delete(void* p) noexcept {
  release(p);
}
void operator delete[](void* p) noexcept {
  release(p);
}
void operator delete(void* p, std::size_t) noexcept {
  release(p);
}
void operator delete[](void* p, std::size_t) noexcept {
  release(p);
}
void operator delete(void* p, std::align_val_t) noexcept {
  release(p);
}
void operator delete[](void* p, std::align_val_t) noexcept {
  release(p);
}
void operator delete(void* p, std::size_t, std::align_val_t) noexcept {
  release(p);
}
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept {
  release(p);
}

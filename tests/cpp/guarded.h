// Memory that ends where its numbers end. With KINML_GPU_MEMORY it is that of `new`, which
// managed_new.cpp lets the GPU see; there compute-sanitizer knows its end.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Numbers whose last one is the last of a page; the page behind it faults.
template <class T>
class Guarded {
 public:
#ifdef KINML_GPU_MEMORY
  Guarded(std::int64_t n, T value) : n_(n), values_(new T[static_cast<std::size_t>(n)]) {
    for (std::int64_t i = 0; i < n; ++i) values_[i] = value;
  }
  ~Guarded() { delete[] values_; }
#else
  Guarded(std::int64_t n, T value) : n_(n) {
    const std::int64_t page = sysconf(_SC_PAGESIZE);
    const std::int64_t bytes = n * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t pages = (bytes + page - 1) / page;
    mapped_ = (pages + 1) * page;
    void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(static_cast<char*>(base) + pages * page, page, PROT_NONE)) {
      std::printf("no guard page\n");
      std::abort();
    }
    base_ = static_cast<char*>(base);
    values_ = reinterpret_cast<T*>(base_ + pages * page - bytes);
    for (std::int64_t i = 0; i < n; ++i) values_[i] = value;
  }
  ~Guarded() { munmap(base_, mapped_); }
#endif
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T& operator[](std::int64_t i) { return values_[i]; }
  T* data() { return values_; }
  std::int64_t size() const { return n_; }

 private:
  std::int64_t n_;
#ifndef KINML_GPU_MEMORY
  std::int64_t mapped_;
  char* base_;
#endif
  T* values_;
};

// Memory that a thread keeps between calls: a kernel call allocates nothing once it is warm.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace kinml::cpu {

// Under the address sanitizer memory is never larger than what was asked for: what is written
// behind it shows.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kExactMemory = true;
#else
inline constexpr bool kExactMemory = false;
#endif

// A growing buffer, aligned to 64 bytes; its content is undefined after get().
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  template <class T>
  T* get(std::size_t count) {
    const std::size_t bytes = (count * sizeof(T) + kPage - 1) / kPage * kPage;
    if (bytes > size_ || (kExactMemory && bytes != size_)) {
      std::free(memory_);
      size_ = 0;
      memory_ = std::aligned_alloc(kPage, bytes);
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(memory_);
  }

 private:
  static constexpr std::size_t kPage = kExactMemory ? 64 : 4096;
  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kinml::cpu

// Macros that let one header serve the CPU (one compilation per instruction set) and CUDA.
//
// KINML_HD        marks a function that runs on host and device, always inlined on the host.
// KINML_ISA       name of the instruction set of this compilation (baseline, avx2, avx512); every
//                 core header stands in `inline namespace KINML_ISA`, so that the linker can never
//                 merge a function compiled for AVX-512 with its namesake for an older processor.
// KINML_UNROLL    before a loop of a known, small number of rounds.
// KINML_VECTOR_BYTES  register width that the CPU kernels of this compilation use.
#pragma once

#include <cstdint>

#ifndef KINML_ISA
#define KINML_ISA baseline
#endif

namespace kinml {
inline namespace KINML_ISA {}  // namespace KINML_ISA
}  // namespace kinml

#if defined(__CUDACC__)
#define KINML_HD __host__ __device__ __forceinline__
#else
#define KINML_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define KINML_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define KINML_UNROLL
#else
#define KINML_UNROLL _Pragma("GCC unroll 8")
#endif

#if defined(__AVX512F__)
#define KINML_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KINML_VECTOR_BYTES 32
#else
#define KINML_VECTOR_BYTES 16
#endif

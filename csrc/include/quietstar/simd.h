// Which instruction set the CPU kernels use. Every *_kernel.cpp is compiled once per set into a
// namespace of its own (quietstar::generic, ::avx2, ::avx512); the choice is made at run time, so a
// library built on one machine runs on another.
#pragma once

#include <string>
#include <vector>

namespace quietstar {

enum class Simd : int { generic = 0, avx2 = 1, avx512 = 2 };

// Names of the sets this library was compiled with, and of those that this machine can run.
std::vector<std::string> compiled_simd();
std::vector<std::string> supported_simd();

// The set in use: the best one supported, unless set_simd chose another.
Simd simd();
std::string simd_name();

// Force a set by name, for the whole process; "auto" returns to the best one.
// Throws std::invalid_argument for a name that is unknown, not compiled in, or not supported here.
void set_simd(const std::string& name);

}  // namespace quietstar

// Declares functions that a *_kernel.cpp defines: once per set.
#define QUIETSTAR_EACH_SIMD(...) \
  namespace generic {            \
  __VA_ARGS__                    \
  }                              \
  namespace avx2 {               \
  __VA_ARGS__                    \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__                    \
  }

// QUIETSTAR_SIMD_CALL(f, args...) calls quietstar::<set>::f(args...) of the set in use.
#ifdef QUIETSTAR_X86
#define QUIETSTAR_SIMD_CALL(function, ...)               \
  (::quietstar::simd() == ::quietstar::Simd::avx512      \
       ? ::quietstar::avx512::function(__VA_ARGS__)      \
       : (::quietstar::simd() == ::quietstar::Simd::avx2 \
              ? ::quietstar::avx2::function(__VA_ARGS__) \
              : ::quietstar::generic::function(__VA_ARGS__)))
#else
#define QUIETSTAR_SIMD_CALL(function, ...) ::quietstar::generic::function(__VA_ARGS__)
#endif

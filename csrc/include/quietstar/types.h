// Element types that every operator's interface shares. No torch, no Python.
#pragma once

#include <cstdint>

namespace quietstar {

// Element type of a buffer; the numbers are part of the Python binding.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// Sixteen-bit floats as they lie in memory.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// Returns function(T{}) for the type T of the elements.
template <class Function>
auto with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::bf16:
      return function(BFloat16{});
    case DType::f16:
      return function(Float16{});
    default:
      return function(float{});
  }
}

}  // namespace quietstar

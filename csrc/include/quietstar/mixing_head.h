// The parts of the mixing head around its matrix products. With b = base[index[r]], z = thought[r]:
//   h1 = relu(W1 [b ; z] + b1)   h2 = relu(W2 h1 + b2)   gate = act(w3 h2)
//   mixed = (1 - gate) b + gate z
// The products themselves are the caller's: from_base = base W1a^T + b1 for every base row,
// thought W1b^T, h1 W2^T, and those of the backward pass.
#pragma once

#include <cstdint>

#include "quietstar/types.h"

namespace quietstar {

// Matrices are row-major without gaps; [..] of dtype where nothing else is said.
struct MixingHead {
  DType dtype;  // f32, bf16 or f16
  std::int64_t rows, positions, width;
  bool sigmoid;               // act: the logistic function, or none
  const std::int64_t* index;  // [rows] in [0, positions), or null: row for row, rows == positions
  const void* base;           // [positions, width]
  const void* thought;        // [rows, width]
  const void* from_base;      // [positions, width]
  void* h1;                   // [rows, width]
  void* h2;                   // [rows, width]
  const void* b2;             // [width], or null: none left to add
  const void* w3;             // [width]
  void* mixed;                // [rows, width]
  float* gate;                // [rows]
  const void* grad_mixed;     // [rows, width]
  const float* grad_gate;     // [rows]
  void* grad_thought;         // [rows, width]
  void* grad_base;            // [positions, width]
  void* grad_h1;              // [rows, width]
  void* grad_from_base;       // [positions, width]
  void* grad_h2;              // [rows, width]
  float* grad_b1;             // [width]
  float* grad_b2;             // [width]
  float* grad_w3;             // [width]
  int threads;                // >= 1; changes nothing in the results
};

// h1 holds thought W1b^T and becomes relu(h1 + from_base[index]).
void mixing_first(const MixingHead& call);

// h2 holds h1 W2^T and becomes relu(h2 + b2); writes gate and mixed.
void mixing_tail(const MixingHead& call);

// From grad_mixed and grad_gate, and with gate and h2 as mixing_tail left them: grad_h2 (of h1
// W2^T), grad_b2, grad_w3, and grad_thought = gate grad_mixed (the part that passes through the
// blend).
void mixing_tail_backward(const MixingHead& call);

// grad_h1 holds the gradient of h1 and becomes that of thought W1b^T; writes its sum over the rows
// of every position, grad_from_base, their sum grad_b1, and grad_base, the same sum of (1 - gate)
// grad_mixed (again without what flows through the products). Positions without rows get 0.
void mixing_first_backward(const MixingHead& call);

}  // namespace quietstar

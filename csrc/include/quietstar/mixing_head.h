// The parts of the mixing head around its matrix products. With b = base[index[r]], z = thought[r]:
//   h1 = relu(W1 [b ; z] + b1)   h2 = relu(W2 h1 + b2)   gate = act(w3 h2)
//   mixed = (1 - gate) b + gate z
// The products themselves are the caller's: from_base = base W1a^T + b1 for every base row,
// thought W1b^T, h1 W2^T, and those of the backward pass.
#pragma once

#include <cstdint>

#include "quietstar/device.h"
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
  const void* from_base;      // [positions, width], base W1a^T + b1; on CUDA base W1a^T in fp32
  const float* product;    // [rows, width], thought W1b^T; may be h1 where dtype is f32. CUDA only
  const void* b1;          // [width]. CUDA only
  void* h1;                // [rows, width]
  void* h2;                // [rows, width]; on CUDA h1 W2^T + b2, before relu, and only read
  const void* b2;          // [width], or null: none left to add. CPU only
  const void* w3;          // [width]
  void* mixed;             // [rows, width]
  void* w;                 // [rows]. CUDA only
  float* gate;             // [rows], w before rounding
  const void* grad_mixed;  // [rows, width]
  const float* grad_gate;  // [rows]
  void* grad_thought;      // [rows, width]
  void* grad_base;         // [positions, width]
  void* grad_h1;           // [rows, width]
  void* grad_from_base;    // [positions, width]
  void* grad_h2;           // [rows, width]
  void* grad_b1;           // [width], and the next two; on the CPU fp32
  void* grad_b2;
  void* grad_w3;
  // CUDA only. The rows of position p, in their order, are order[first[p]] ..
  // order[first[p + 1] - 1].
  const std::int64_t* first;  // [positions + 1], or null where index is
  const std::int64_t* order;  // [rows], or null where index is
  float* workspace;           // [mixing_workspace(..)], for the two backward functions
  int threads;                // >= 1; changes nothing in the results. CPU only
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

// The same on a CUDA device. What differs: the products of the first layer come in fp32 and are
// added before anything is rounded; the second layer's product comes with its bias and is only
// read, everywhere through relu; and the rows of a position are handed in as lists.
namespace cuda {

// Widths beyond it are rejected: the column sums of a block have to fit into its shared memory.
std::int64_t max_mixing_width(const Device& device);

// Numbers of fp32 that the backward functions need as workspace.
std::int64_t mixing_workspace(DType dtype, std::int64_t rows, std::int64_t positions,
                              std::int64_t width);

// h1 = relu(product + from_base[index] + b1). An index out of range is a device-side assertion.
void mixing_first(const MixingHead& call, const Device& device);

// Writes gate, w and mixed.
void mixing_tail(const MixingHead& call, const Device& device);

void mixing_tail_backward(const MixingHead& call, const Device& device);
void mixing_first_backward(const MixingHead& call, const Device& device);

}  // namespace cuda
}  // namespace quietstar

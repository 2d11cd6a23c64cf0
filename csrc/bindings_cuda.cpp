// The CUDA half of the Python module: like bindings.cpp, with a Device as the last argument.
// Compiled on its own, so that csrc/testing can put the same functions in front of kernels that run
// on the CPU.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include "quietstar/device.h"
#include "quietstar/linear_cross_entropy.h"
#include "quietstar/mixing_head.h"
#include "quietstar/sample_tokens.h"
#include "quietstar/thought_attention.h"
#include "quietstar/thought_diagonal.h"
#include "unpack.h"

namespace cuda = quietstar::cuda;

void bind_cuda(pybind11::module_& m) {
  using quietstar::bind;
  bind(m, "cuda_versions", &cuda::versions);
  bind(m, "cuda_mixing_max_width", &cuda::max_mixing_width);
  bind(m, "cuda_mixing_workspace", &cuda::mixing_workspace);
  bind(m, "cuda_mixing_first", &cuda::mixing_first);
  bind(m, "cuda_mixing_tail", &cuda::mixing_tail);
  bind(m, "cuda_mixing_tail_backward", &cuda::mixing_tail_backward);
  bind(m, "cuda_mixing_first_backward", &cuda::mixing_first_backward);
  bind(m, "cuda_softmax_cross_entropy", &cuda::softmax_cross_entropy);
  bind(m, "cuda_banned_tokens", &cuda::banned_tokens);
  bind(m, "cuda_scale_in_place", &cuda::scale_in_place);
  bind(m, "cuda_sample_tokens_workspace", &cuda::sample_tokens_workspace);
  bind(m, "cuda_sample_tokens", &cuda::sample_tokens);
  bind(m, "cuda_thought_attention_workspace", &cuda::thought_attention_workspace);
  bind(m, "cuda_thought_attention_shared_memory", &cuda::thought_attention_shared_memory);
  bind(m, "cuda_thought_attention", &cuda::thought_attention);
  bind(m, "cuda_thought_attention_backward", &cuda::thought_attention_backward);
  bind(m, "cuda_thought_diagonal", &cuda::thought_diagonal);
  bind(m, "cuda_thought_diagonal_backward", &cuda::thought_diagonal_backward);
}

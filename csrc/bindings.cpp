// The Python module quietstar_ext._native. This file, bindings_cuda.cpp and unpack.h are the only
// ones that know Python, and none knows torch. Tensors arrive as addresses, sizes and strides;
// shapes, checks and allocation are Python's. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "quietstar/linear_cross_entropy.h"
#include "quietstar/mixing_head.h"
#include "quietstar/philox.h"
#include "quietstar/sample_tokens.h"
#include "quietstar/simd.h"
#include "quietstar/thought_attention.h"
#include "unpack.h"

#ifdef QUIETSTAR_WITH_CUDA
#include "bindings_cuda.h"
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = QUIETSTAR_VERSION;
  info["simd_compiled"] = quietstar::compiled_simd();
  info["simd_supported"] = quietstar::supported_simd();
  info["simd"] = quietstar::simd_name();
#ifdef QUIETSTAR_WITH_CUDA
  info["cuda_archs"] = QUIETSTAR_CUDA_ARCHS;
#else
  info["cuda_archs"] = "";
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of quietstar_ext; call them through quietstar_ext.";
  m.def("build_info", &build_info);
  m.def("set_simd", &quietstar::set_simd);
  m.def("philox_uniform", &quietstar::philox_uniform);

  using quietstar::bind;
  bind(m, "sample_tokens_workspace", &quietstar::sample_tokens_workspace);
  bind(m, "sample_tokens", &quietstar::sample_tokens);
  bind(m, "mixing_first", &quietstar::mixing_first);
  bind(m, "mixing_tail", &quietstar::mixing_tail);
  bind(m, "mixing_tail_backward", &quietstar::mixing_tail_backward);
  bind(m, "mixing_first_backward", &quietstar::mixing_first_backward);
  bind(m, "softmax_cross_entropy_workspace", &quietstar::softmax_cross_entropy_workspace);
  bind(m, "softmax_cross_entropy_loss", &quietstar::softmax_cross_entropy_loss);
  bind(m, "softmax_cross_entropy_gradient", &quietstar::softmax_cross_entropy_gradient);
  bind(m, "thought_attention_workspace", &quietstar::thought_attention_workspace);
  bind(m, "thought_attention", &quietstar::thought_attention);
  bind(m, "thought_attention_backward", &quietstar::thought_attention_backward);
#ifdef QUIETSTAR_WITH_CUDA
  bind_cuda(m);
#endif
}

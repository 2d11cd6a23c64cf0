// The Python module quietstar_ext._native: the only file that knows Python, and none knows torch.
// Tensors arrive as addresses, sizes and strides, positionally (about 0.5 microseconds a call);
// shapes, checks and allocation are Python's. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "quietstar/philox.h"
#include "quietstar/sample_tokens.h"
#include "quietstar/simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

py::dict build_info() {
  py::dict info;
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

std::int64_t sample_tokens(Address logits, int dtype, std::int64_t rows, std::int64_t vocab,
                           std::int64_t row_stride, double temperature, std::int64_t top_k,
                           double top_p, double min_p, Address banned, std::int64_t banned_count,
                           std::int64_t seed, std::int64_t offset, Address tokens, Address logprobs,
                           Address workspace, int threads) {
  quietstar::SampleTokens call{};
  call.logits = pointer<const void>(logits);
  call.dtype = static_cast<quietstar::DType>(dtype);
  call.rows = rows;
  call.vocab = vocab;
  call.row_stride = row_stride;
  call.temperature = temperature;
  call.top_k = top_k;
  call.top_p = top_p;
  call.min_p = min_p;
  call.banned = pointer<const std::int64_t>(banned);
  call.banned_count = banned_count;
  call.seed = static_cast<std::uint64_t>(seed);
  call.offset = static_cast<std::uint64_t>(offset);
  call.tokens = pointer<std::int64_t>(tokens);
  call.logprobs = pointer<float>(logprobs);
  call.workspace = pointer<void>(workspace);
  call.threads = threads;
  return quietstar::sample_tokens(call);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of quietstar_ext; call them through quietstar_ext.";
  m.def("build_info", &build_info);
  m.def("set_simd", &quietstar::set_simd);
  m.def("philox_uniform", &quietstar::philox_uniform);

  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("sample_tokens_workspace", &quietstar::sample_tokens_workspace);
  m.def("sample_tokens", &sample_tokens, release);
}

// The CUDA half of the Python module: like bindings.cpp, with the device's number and the stream as
// the last two arguments of every function. Compiled on its own, so that csrc/testing can put the
// same functions in front of kernels that run on the CPU.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <utility>

#include "quietstar/device.h"
#include "quietstar/linear_cross_entropy.h"
#include "quietstar/mixing_head.h"
#include "quietstar/sample_tokens.h"
#include "quietstar/types.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// tensors: the pointers of cuda::MixingHead, in its order.
template <void (*run)(const quietstar::cuda::MixingHead&, const quietstar::cuda::Device&)>
void mixing_head(int dtype, std::int64_t rows, std::int64_t positions, std::int64_t width,
                 bool sigmoid, const std::array<Address, 25>& tensors, int device, Address stream) {
  quietstar::cuda::MixingHead call{};
  call.dtype = static_cast<quietstar::DType>(dtype);
  call.rows = rows;
  call.positions = positions;
  call.width = width;
  call.sigmoid = sigmoid;
  const Address* next = tensors.data();
  call.index = pointer<const std::int64_t>(*next++);
  call.base = pointer<const void>(*next++);
  call.thought = pointer<const void>(*next++);
  call.from_base = pointer<const float>(*next++);
  call.product = pointer<const float>(*next++);
  call.b1 = pointer<const void>(*next++);
  call.h1 = pointer<void>(*next++);
  call.h2 = pointer<const void>(*next++);
  call.w3 = pointer<const void>(*next++);
  call.mixed = pointer<void>(*next++);
  call.w = pointer<void>(*next++);
  call.gate = pointer<float>(*next++);
  call.grad_mixed = pointer<const void>(*next++);
  call.grad_gate = pointer<const float>(*next++);
  call.grad_thought = pointer<void>(*next++);
  call.grad_base = pointer<void>(*next++);
  call.grad_h1 = pointer<void>(*next++);
  call.grad_from_base = pointer<void>(*next++);
  call.grad_h2 = pointer<void>(*next++);
  call.grad_b1 = pointer<void>(*next++);
  call.grad_b2 = pointer<void>(*next++);
  call.grad_w3 = pointer<void>(*next++);
  call.first = pointer<const std::int64_t>(*next++);
  call.order = pointer<const std::int64_t>(*next++);
  call.workspace = pointer<float>(*next++);
  run(call, {device, stream});
}

void softmax_cross_entropy(Address logits, int dtype, std::int64_t rows, std::int64_t words,
                           std::int64_t row_stride, Address targets, Address live, Address banned,
                           double temperature, double softcap, double logit_scale, Address nll,
                           Address row_weights, int device, Address stream) {
  quietstar::cuda::SoftmaxCrossEntropy call{};
  call.logits = pointer<void>(logits);
  call.dtype = static_cast<quietstar::DType>(dtype);
  call.rows = rows;
  call.words = words;
  call.row_stride = row_stride;
  call.targets = pointer<const std::int64_t>(targets);
  call.live = pointer<const unsigned char>(live);
  call.banned = pointer<const std::uint32_t>(banned);
  call.temperature = temperature;
  call.softcap = softcap;
  call.logit_scale = logit_scale;
  call.nll = pointer<float>(nll);
  call.row_weights = pointer<const float>(row_weights);
  quietstar::cuda::softmax_cross_entropy(call, {device, stream});
}

void banned_words(Address ids, std::int64_t count, std::int64_t words, Address mask, int device,
                  Address stream) {
  quietstar::cuda::banned_words(pointer<const std::int64_t>(ids), count, words,
                                pointer<std::uint32_t>(mask), {device, stream});
}

void scale_in_place(Address data, int dtype, std::int64_t count, Address factor, int device,
                    Address stream) {
  quietstar::cuda::scale_in_place(pointer<void>(data), static_cast<quietstar::DType>(dtype), count,
                                  pointer<const float>(factor), {device, stream});
}

// options: temperature, top_p, min_p, logit_scale, softcap.
void sample_tokens(Address logits, int dtype, std::int64_t rows, std::int64_t vocab,
                   std::int64_t row_stride, const std::array<double, 5>& options,
                   std::int64_t top_k, Address banned, std::int64_t banned_count, Address seed,
                   std::int64_t offset, Address tokens, Address logprobs, Address workspace,
                   int device, Address stream) {
  quietstar::cuda::SampleTokens call{};
  call.logits = pointer<const void>(logits);
  call.dtype = static_cast<quietstar::DType>(dtype);
  call.rows = rows;
  call.vocab = vocab;
  call.row_stride = row_stride;
  call.temperature = options[0];
  call.top_k = top_k;
  call.top_p = options[1];
  call.min_p = options[2];
  call.logit_scale = options[3];
  call.softcap = options[4];
  call.banned = pointer<const std::int64_t>(banned);
  call.banned_count = banned_count;
  call.seed = pointer<const std::int64_t>(seed);
  call.offset = static_cast<std::uint64_t>(offset);
  call.tokens = pointer<std::int64_t>(tokens);
  call.logprobs = pointer<float>(logprobs);
  call.workspace = pointer<void>(workspace);
  quietstar::cuda::sample_tokens(call, {device, stream});
}

}  // namespace

void bind_cuda(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_versions", [] {
    const quietstar::cuda::Versions found = quietstar::cuda::versions();
    return std::array<int, 2>{found.driver, found.runtime};
  });
  m.def("cuda_mixing_most_width", [](int device, Address stream) {
    return quietstar::cuda::most_mixing_width({device, stream});
  });
  m.def("cuda_mixing_workspace",
        [](int dtype, std::int64_t rows, std::int64_t positions, std::int64_t width) {
          return quietstar::cuda::mixing_workspace(static_cast<quietstar::DType>(dtype), rows,
                                                   positions, width);
        });
  m.def("cuda_mixing_first", &mixing_head<&quietstar::cuda::mixing_first>, release);
  m.def("cuda_mixing_tail", &mixing_head<&quietstar::cuda::mixing_tail>, release);
  m.def("cuda_mixing_tail_backward", &mixing_head<&quietstar::cuda::mixing_tail_backward>, release);
  m.def("cuda_mixing_first_backward", &mixing_head<&quietstar::cuda::mixing_first_backward>,
        release);
  m.def("cuda_softmax_cross_entropy", &softmax_cross_entropy, release);
  m.def("cuda_banned_words", &banned_words, release);
  m.def("cuda_scale_in_place", &scale_in_place, release);
  m.def("cuda_sample_tokens_workspace", [](int dtype, std::int64_t rows, std::int64_t vocab,
                                           std::int64_t banned_count, int device, Address stream) {
    return quietstar::cuda::sample_tokens_workspace(static_cast<quietstar::DType>(dtype), rows,
                                                    vocab, banned_count, {device, stream});
  });
  m.def("cuda_sample_tokens", &sample_tokens, release);
  bind_cuda_attention(m);
}

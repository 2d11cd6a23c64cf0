// The Python module quietstar_ext._native. This file and bindings_cuda.cpp are the only ones that
// know Python, and none knows torch. Tensors arrive as addresses, sizes and strides, positionally
// (about 0.5 microseconds a call); shapes, checks and allocation are Python's.
// std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>

#include "quietstar/linear_cross_entropy.h"
#include "quietstar/mixing_head.h"
#include "quietstar/philox.h"
#include "quietstar/sample_tokens.h"
#include "quietstar/simd.h"
#include "quietstar/thought_attention.h"

#ifdef QUIETSTAR_WITH_CUDA
#include "bindings_cuda.h"
#endif

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

// ---- thought_attention

// Address and strides [B, H, S, M, D] of a tensor, or [B, H, N, D] of a text tensor.
using Slots = std::pair<Address, std::array<std::int64_t, 5>>;
using Text = std::pair<Address, std::array<std::int64_t, 4>>;

quietstar::AttentionTensor attention_tensor(const Slots& t) {
  return {pointer<void>(t.first), t.second[0], t.second[1], t.second[2], t.second[3]};
}
quietstar::AttentionTensor attention_tensor(const Text& t) {
  return {pointer<void>(t.first), t.second[0], t.second[1], t.second[2], 0};
}

// sizes: B, Hq, Hkv, Sq, Sk, M, N, D
quietstar::ThoughtAttention attention_sizes(const std::array<std::int64_t, 8>& sizes, int threads) {
  quietstar::ThoughtAttention call{};
  call.batch = sizes[0];
  call.q_heads = sizes[1];
  call.kv_heads = sizes[2];
  call.query_slots = sizes[3];
  call.key_slots = sizes[4];
  call.columns = sizes[5];
  call.text_length = sizes[6];
  call.head_size = sizes[7];
  call.threads = threads;
  return call;
}

std::int64_t thought_attention_workspace(const std::array<std::int64_t, 8>& sizes, bool backward,
                                         int threads) {
  return quietstar::thought_attention_workspace(attention_sizes(sizes, threads), backward);
}

quietstar::ThoughtAttention attention_call(int dtype, const std::array<std::int64_t, 8>& sizes,
                                           const Slots& q, const Text& k_text, const Text& v_text,
                                           const Slots& k_thought, const Slots& v_thought,
                                           const Slots& out, Address lse, Address text_start,
                                           Address text_stop, Address sinks, double scale,
                                           std::int64_t window, double softcap, Address workspace,
                                           int threads) {
  quietstar::ThoughtAttention call = attention_sizes(sizes, threads);
  call.dtype = static_cast<quietstar::DType>(dtype);
  call.q = attention_tensor(q);
  call.k_text = attention_tensor(k_text);
  call.v_text = attention_tensor(v_text);
  call.k_thought = attention_tensor(k_thought);
  call.v_thought = attention_tensor(v_thought);
  call.out = attention_tensor(out);
  call.lse = pointer<float>(lse);
  call.text_start = pointer<const std::int32_t>(text_start);
  call.text_stop = pointer<const std::int32_t>(text_stop);
  call.sinks = pointer<const float>(sinks);
  call.scale = scale;
  call.window = window;
  call.softcap = softcap;
  call.workspace = pointer<void>(workspace);
  return call;
}

void thought_attention(int dtype, const std::array<std::int64_t, 8>& sizes, const Slots& q,
                       const Text& k_text, const Text& v_text, const Slots& k_thought,
                       const Slots& v_thought, const Slots& out, Address lse, Address text_start,
                       Address text_stop, Address sinks, double scale, std::int64_t window,
                       double softcap, Address workspace, int threads) {
  quietstar::thought_attention(attention_call(dtype, sizes, q, k_text, v_text, k_thought, v_thought,
                                              out, lse, text_start, text_stop, sinks, scale, window,
                                              softcap, workspace, threads));
}

void thought_attention_backward(int dtype, const std::array<std::int64_t, 8>& sizes, const Slots& q,
                                const Text& k_text, const Text& v_text, const Slots& k_thought,
                                const Slots& v_thought, const Slots& out, Address lse,
                                Address text_start, Address text_stop, Address sinks, double scale,
                                std::int64_t window, double softcap, Address workspace, int threads,
                                const Slots& dout, Address dlse, const Slots& dq,
                                const Text& dk_text, const Text& dv_text, const Slots& dk_thought,
                                const Slots& dv_thought, Address delta) {
  quietstar::ThoughtAttentionBackward call{};
  call.forward =
      attention_call(dtype, sizes, q, k_text, v_text, k_thought, v_thought, out, lse, text_start,
                     text_stop, sinks, scale, window, softcap, workspace, threads);
  call.dout = attention_tensor(dout);
  call.dlse = pointer<const float>(dlse);
  call.dq = attention_tensor(dq);
  call.dk_text = attention_tensor(dk_text);
  call.dv_text = attention_tensor(dv_text);
  call.dk_thought = attention_tensor(dk_thought);
  call.dv_thought = attention_tensor(dv_thought);
  call.delta = pointer<float>(delta);
  quietstar::thought_attention_backward(call);
}

template <void run(const quietstar::SoftmaxCrossEntropy&)>
void softmax_cross_entropy(Address logits, int dtype, std::int64_t rows, std::int64_t words,
                           std::int64_t word_stride, std::int64_t first_word, Address targets,
                           Address banned, std::int64_t banned_count, double temperature,
                           double softcap, double logit_scale, Address largest, Address total,
                           Address nll, Address row_weights, Address workspace, int threads) {
  quietstar::SoftmaxCrossEntropy call{};
  call.logits = pointer<void>(logits);
  call.dtype = static_cast<quietstar::DType>(dtype);
  call.rows = rows;
  call.words = words;
  call.word_stride = word_stride;
  call.first_word = first_word;
  call.targets = pointer<const std::int64_t>(targets);
  call.banned = pointer<const std::int64_t>(banned);
  call.banned_count = banned_count;
  call.temperature = temperature;
  call.softcap = softcap;
  call.logit_scale = logit_scale;
  call.largest = pointer<float>(largest);
  call.total = pointer<float>(total);
  call.nll = pointer<float>(nll);
  call.row_weights = pointer<const float>(row_weights);
  call.workspace = pointer<void>(workspace);
  call.threads = threads;
  run(call);
}

// tensors: the addresses of MixingHead from index to grad_w3, in its order.
template <void run(const quietstar::MixingHead&)>
void mixing_head(int dtype, std::int64_t rows, std::int64_t positions, std::int64_t width,
                 bool sigmoid, const std::array<Address, 20>& tensors, int threads) {
  quietstar::MixingHead call{};
  call.dtype = static_cast<quietstar::DType>(dtype);
  call.rows = rows;
  call.positions = positions;
  call.width = width;
  call.sigmoid = sigmoid;
  const Address* next = tensors.data();
  call.index = pointer<const std::int64_t>(*next++);
  call.base = pointer<const void>(*next++);
  call.thought = pointer<const void>(*next++);
  call.from_base = pointer<const void>(*next++);
  call.h1 = pointer<void>(*next++);
  call.h2 = pointer<void>(*next++);
  call.b2 = pointer<const void>(*next++);
  call.w3 = pointer<const void>(*next++);
  call.mixed = pointer<void>(*next++);
  call.gate = pointer<float>(*next++);
  call.grad_mixed = pointer<const void>(*next++);
  call.grad_gate = pointer<const float>(*next++);
  call.grad_thought = pointer<void>(*next++);
  call.grad_base = pointer<void>(*next++);
  call.grad_h1 = pointer<void>(*next++);
  call.grad_from_base = pointer<void>(*next++);
  call.grad_h2 = pointer<void>(*next++);
  call.grad_b1 = pointer<float>(*next++);
  call.grad_b2 = pointer<float>(*next++);
  call.grad_w3 = pointer<float>(*next++);
  call.threads = threads;
  run(call);
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
  m.def("mixing_first", &mixing_head<&quietstar::mixing_first>, release);
  m.def("mixing_tail", &mixing_head<&quietstar::mixing_tail>, release);
  m.def("mixing_tail_backward", &mixing_head<&quietstar::mixing_tail_backward>, release);
  m.def("mixing_first_backward", &mixing_head<&quietstar::mixing_first_backward>, release);
  m.def("softmax_cross_entropy_workspace", &quietstar::softmax_cross_entropy_workspace);
  m.def("softmax_cross_entropy_loss",
        &softmax_cross_entropy<&quietstar::softmax_cross_entropy_loss>, release);
  m.def("softmax_cross_entropy_gradient",
        &softmax_cross_entropy<&quietstar::softmax_cross_entropy_gradient>, release);

  m.def("thought_attention_workspace", &thought_attention_workspace);
  m.def("thought_attention", &thought_attention, release);
  m.def("thought_attention_backward", &thought_attention_backward, release);
#ifdef QUIETSTAR_WITH_CUDA
  bind_cuda(m);
#endif
}

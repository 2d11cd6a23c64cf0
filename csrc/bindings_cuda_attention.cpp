// thought_attention's part of bindings_cuda.cpp.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <utility>

#include "bindings_cuda.h"
#include "quietstar/thought_attention.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
// Address and strides [B, H, S, M, D] of a tensor, or [B, H, N, D] of a text tensor.
using Slots = std::pair<Address, std::array<std::int64_t, 5>>;
using Text = std::pair<Address, std::array<std::int64_t, 4>>;
using Sizes = std::array<std::int64_t, 8>;  // B, Hq, Hkv, Sq, Sk, M, N, D

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

quietstar::AttentionTensor tensor(const Slots& t) {
  return {pointer<void>(t.first), t.second[0], t.second[1], t.second[2], t.second[3]};
}
quietstar::AttentionTensor tensor(const Text& t) {
  return {pointer<void>(t.first), t.second[0], t.second[1], t.second[2], 0};
}

quietstar::ThoughtAttention call_of_sizes(int dtype, const Sizes& sizes) {
  quietstar::ThoughtAttention call{};
  call.dtype = static_cast<quietstar::DType>(dtype);
  call.batch = sizes[0];
  call.q_heads = sizes[1];
  call.kv_heads = sizes[2];
  call.query_slots = sizes[3];
  call.key_slots = sizes[4];
  call.columns = sizes[5];
  call.text_length = sizes[6];
  call.head_size = sizes[7];
  return call;
}

std::int64_t workspace(int dtype, const Sizes& sizes, bool backward, int device,
                       std::uintptr_t stream) {
  return quietstar::cuda::thought_attention_workspace(call_of_sizes(dtype, sizes), backward,
                                                      {device, stream});
}

std::pair<std::int64_t, std::int64_t> shared_memory(int dtype, std::int64_t head_size, int device,
                                                    std::uintptr_t stream) {
  const auto memory = quietstar::cuda::thought_attention_shared_memory(
      static_cast<quietstar::DType>(dtype), head_size, {device, stream});
  return {memory.needed, memory.available};
}

quietstar::ThoughtAttention call_of(int dtype, const Sizes& sizes, const Slots& q,
                                    const Text& k_text, const Text& v_text, const Slots& k_thought,
                                    const Slots& v_thought, const Slots& out, Address lse,
                                    Address text_start, Address text_stop, Address sinks,
                                    double scale, std::int64_t window, double softcap,
                                    Address workspace, bool tf32) {
  quietstar::ThoughtAttention call = call_of_sizes(dtype, sizes);
  call.q = tensor(q);
  call.k_text = tensor(k_text);
  call.v_text = tensor(v_text);
  call.k_thought = tensor(k_thought);
  call.v_thought = tensor(v_thought);
  call.out = tensor(out);
  call.lse = pointer<float>(lse);
  call.text_start = pointer<const std::int32_t>(text_start);
  call.text_stop = pointer<const std::int32_t>(text_stop);
  call.sinks = pointer<const float>(sinks);
  call.scale = scale;
  call.window = window;
  call.softcap = softcap;
  call.workspace = pointer<void>(workspace);
  call.tf32 = tf32;
  return call;
}

void forward(int dtype, const Sizes& sizes, const Slots& q, const Text& k_text, const Text& v_text,
             const Slots& k_thought, const Slots& v_thought, const Slots& out, Address lse,
             Address text_start, Address text_stop, Address sinks, double scale,
             std::int64_t window, double softcap, Address workspace, bool tf32, int device,
             std::uintptr_t stream) {
  quietstar::cuda::thought_attention(
      call_of(dtype, sizes, q, k_text, v_text, k_thought, v_thought, out, lse, text_start,
              text_stop, sinks, scale, window, softcap, workspace, tf32),
      {device, stream});
}

void backward(int dtype, const Sizes& sizes, const Slots& q, const Text& k_text, const Text& v_text,
              const Slots& k_thought, const Slots& v_thought, const Slots& out, Address lse,
              Address text_start, Address text_stop, Address sinks, double scale,
              std::int64_t window, double softcap, Address workspace, bool tf32, const Slots& dout,
              Address dlse, const Slots& dq, const Text& dk_text, const Text& dv_text,
              const Slots& dk_thought, const Slots& dv_thought, Address delta, int device,
              std::uintptr_t stream) {
  quietstar::ThoughtAttentionBackward call{};
  call.forward = call_of(dtype, sizes, q, k_text, v_text, k_thought, v_thought, out, lse,
                         text_start, text_stop, sinks, scale, window, softcap, workspace, tf32);
  call.dout = tensor(dout);
  call.dlse = pointer<const float>(dlse);
  call.dq = tensor(dq);
  call.dk_text = tensor(dk_text);
  call.dv_text = tensor(dv_text);
  call.dk_thought = tensor(dk_thought);
  call.dv_thought = tensor(dv_thought);
  call.delta = pointer<float>(delta);
  quietstar::cuda::thought_attention_backward(call, {device, stream});
}

}  // namespace

void bind_cuda_attention(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_thought_attention_workspace", &workspace, release);
  m.def("cuda_thought_attention_shared_memory", &shared_memory, release);
  m.def("cuda_thought_attention", &forward, release);
  m.def("cuda_thought_attention_backward", &backward, release);
  bind_cuda_diagonal(m);
}

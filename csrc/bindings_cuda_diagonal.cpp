// thought_diagonal's part of bindings_cuda_attention.cpp.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <utility>

#include "bindings_cuda.h"
#include "quietstar/thought_diagonal.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
// Address and strides [B, H, S, M, D] of a tensor; numbers per row [B, H, S, M] have 1 as the last.
using Slots = std::pair<Address, std::array<std::int64_t, 5>>;
using Sizes = std::array<std::int64_t, 7>;  // B, Hq, Hkv, Sq, Sk, M, D

quietstar::AttentionTensor tensor(const Slots& t) {
  return {reinterpret_cast<void*>(t.first), t.second[0], t.second[1], t.second[2], t.second[3]};
}

quietstar::cuda::ThoughtDiagonal call_of(int dtype, const Sizes& sizes, const Slots& q,
                                         const Slots& k_thought, const Slots& v_thought,
                                         const Slots& out, const Slots& lse, double scale) {
  quietstar::cuda::ThoughtDiagonal call{};
  call.dtype = static_cast<quietstar::DType>(dtype);
  call.batch = sizes[0];
  call.q_heads = sizes[1];
  call.kv_heads = sizes[2];
  call.query_slots = sizes[3];
  call.key_slots = sizes[4];
  call.columns = sizes[5];
  call.head_size = sizes[6];
  call.q = tensor(q);
  call.k_thought = tensor(k_thought);
  call.v_thought = tensor(v_thought);
  call.out = tensor(out);
  call.lse = tensor(lse);
  call.scale = scale;
  return call;
}

void forward(int dtype, const Sizes& sizes, const Slots& q, const Slots& k_thought,
             const Slots& v_thought, const Slots& text_out, const Slots& text_lse, const Slots& out,
             const Slots& lse, Address sinks, double scale, int device, std::uintptr_t stream) {
  auto call = call_of(dtype, sizes, q, k_thought, v_thought, out, lse, scale);
  call.text_out = tensor(text_out);
  call.text_lse = tensor(text_lse);
  call.sinks = reinterpret_cast<const float*>(sinks);
  quietstar::cuda::thought_diagonal(call, {device, stream});
}

void backward(int dtype, const Sizes& sizes, const Slots& q, const Slots& k_thought,
              const Slots& v_thought, const Slots& out, const Slots& lse, double scale,
              const Slots& dout, const Slots& text_dq, const Slots& dq, const Slots& dk_thought,
              const Slots& dv_thought, const Slots& delta, int device, std::uintptr_t stream) {
  quietstar::cuda::ThoughtDiagonalBackward call{};
  call.forward = call_of(dtype, sizes, q, k_thought, v_thought, out, lse, scale);
  call.dout = tensor(dout);
  call.text_dq = tensor(text_dq);
  call.dq = tensor(dq);
  call.dk_thought = tensor(dk_thought);
  call.dv_thought = tensor(dv_thought);
  call.delta = tensor(delta);
  quietstar::cuda::thought_diagonal_backward(call, {device, stream});
}

}  // namespace

void bind_cuda_diagonal(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_thought_diagonal", &forward, release);
  m.def("cuda_thought_diagonal_backward", &backward, release);
}

"""The kernels of thought_attention for text and slots, their operators, and first derivatives."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quietstar_ext.checks import dtype_name
from quietstar_ext.derivatives import first_only
from quietstar_ext.native import (
    DTYPE_CODES,
    cuda_device,
    cuda_kernels,
    fields,
    native,
    native_unsupported_reason,
    takes_cuda_path,
)
from quietstar_ext.operators import register
from quietstar_ext.thought_attention import composed
from quietstar_ext.thought_attention.call import (
    TENSORS,
    Gradients,
    ThoughtAttention,
    ThoughtAttentionBackward,
    last_contiguous,
    new_lse,
    place,
)

# Of the CUDA kernels; and up to which their tiles fit every device (thought_attention_shapes.cuh).
MAX_HEAD_SIZE = 256
FITTING_HEAD_SIZE = 128


def fused_unsupported_reason(q: Tensor) -> str | None:
    """Half a sentence on why no kernel takes these queries, or None where one does."""
    size = q.shape[-1]
    if takes_cuda_path(q) and size > MAX_HEAD_SIZE:
        return f"the CUDA kernels take head sizes up to {MAX_HEAD_SIZE}, not {size}"
    reason = native_unsupported_reason(q)
    if reason is None and takes_cuda_path(q) and size > FITTING_HEAD_SIZE:
        needed, available = _shared_memory(DTYPE_CODES[q.dtype], q.device.index or 0)
        if needed > available:
            return (
                f"the CUDA kernels for {dtype_name(q.dtype)} heads of {size} need {needed} bytes of "
                f"shared memory in a block, and this device has {available}"
            )
    return reason


@torch.compiler.assume_constant_result
def _shared_memory(dtype_code: int, device: int) -> tuple[int, int]:
    """Bytes of it that a block of the largest heads' kernels needs, and may have on the device."""
    size_of = cuda_kernels().cuda_thought_attention_shared_memory
    needed, available = size_of(dtype_code, MAX_HEAD_SIZE, (device, 0))
    return needed, available


def attend(
    call: ThoughtAttention, is_composed: bool, rationale_major: bool = False
) -> tuple[Tensor, Tensor]:
    """out and lse of the fused or the composed path, with gradients where they are wanted.

    The order of the columns (:class:`~quietstar_ext.thought_attention.composed.ComposedAttention`) is
    the composed path's alone.
    """
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in call):
        options = (*call[TENSORS:], rationale_major)
        return _ThoughtAttention.apply(is_composed, options, *call[:TENSORS])
    return composed.operator(*call, rationale_major) if is_composed else operator(*call)


class _ThoughtAttention(torch.autograd.Function):
    """out and lse with gradients to the five tensors and to the sinks."""

    @staticmethod
    def forward(
        ctx: Any, is_composed: bool, options: tuple[float, int, float, bool], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        *rest, rationale_major = options
        if is_composed:
            out, lse = composed.operator(*tensors, *rest, rationale_major)
        else:
            out, lse = operator(*tensors, *rest)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.is_composed, ctx.options = is_composed, options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        sinks, dsinks = inputs[7], None
        *rest, rationale_major = ctx.options
        with torch.no_grad():
            if dout is None:
                dout = torch.zeros_like(out)
            call = (*inputs, *rest, out, lse, dout, dlse)
            # The stock backward cannot take a gradient of lse.
            if ctx.is_composed and dlse is None:
                *gradients, delta = composed.backward_operator(*call, rationale_major)
            else:
                *gradients, delta = backward_operator(*call)
            if sinks is not None and ctx.needs_input_grad[2 + 7]:
                # A sink is a logit with the value 0, so its share of the gradient is p (0 - delta).
                p = torch.exp(sinks.float()[:, None, None] - lse)
                p = p.masked_fill(lse == -torch.inf, 0)
                dsinks = -(p * delta).sum((0, 2, 3)).to(sinks.dtype)
        results = first_only("thought_attention", inputs, (*gradients, None, None, dsinks))
        return (None, None, *results)


def _empty_rows(tensor: Tensor) -> Tensor:
    """Uninitialised, in the memory order of tensor, with the elements of a row side by side."""
    return torch.empty_like(last_contiguous(tensor))


def _run(name: str, call: ThoughtAttention, out: Tensor, lse: Tensor, *more: Any) -> None:
    """Run a function of the core on the device of the tensors; ``more`` is the backward pass's."""
    call = call.laid_out()
    q, k_text, _, k_thought, *_ = call
    batch, q_heads, slots, columns, size = q.shape
    heads, length = k_text.shape[1:3]
    on_cuda = takes_cuda_path(q)
    module, prefix = (cuda_kernels(), "cuda_") if on_cuda else (native(), "")
    device = (cuda_device(q),) if on_cuda else ()
    # Whether fp32 products may round to tf32 is CUDA's, the threads are the CPU's.
    tf32 = on_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    sizes = fields(q.dtype, batch, q_heads, heads, slots, k_thought.shape[2], columns, length, size)
    options = call.scale, call.window, call.softcap, torch.get_num_threads(), tf32
    places = fields(*map(place, (*call[:5], out)), lse, call.text_start, call.text_stop, call.sinks)
    taken = (*sizes, *places, *options)
    if on_cuda:
        needed = cuda_kernels().cuda_thought_attention_workspace((*taken, 0), bool(more), *device)
    else:
        needed = _workspace_size(sizes, options, bool(more))
    workspace = torch.empty(needed, dtype=torch.uint8, device=q.device)
    taken = (*taken, workspace.data_ptr())
    getattr(module, prefix + name)((taken, *more) if more else taken, *device)


@functools.lru_cache(maxsize=1024)
def _workspace_size(sizes: tuple[int, ...], options: tuple[float, ...], backward: bool) -> int:
    """Bytes for a call on the CPU; asking costs as much as a small call."""
    nowhere = ((0,) * 5,) * 6 + (0,) * 4
    needed: int = native().thought_attention_workspace((*sizes, *nowhere, *options, 0), backward)
    return needed


def _forward(call: ThoughtAttention) -> tuple[Tensor, Tensor]:
    out, lse = _fake(call)
    _run("thought_attention", call, out, lse)
    return out, lse


def _backward(call: ThoughtAttentionBackward) -> Gradients:
    out, lse, dout = last_contiguous(call.out), call.lse.contiguous(), last_contiguous(call.dout)
    dlse = None if call.dlse is None else call.dlse.contiguous()
    *gradients, delta = results = _backward_fake(call)
    more = fields(place(dout), dlse, *map(place, gradients), delta)
    _run("thought_attention_backward", call.forward, out, lse, *more)
    return results


def _fake(call: ThoughtAttention) -> tuple[Tensor, Tensor]:
    return _empty_rows(call.q), new_lse(call.q)


def _backward_fake(call: ThoughtAttentionBackward) -> Gradients:
    dq, dk_text, dv_text, dk_thought, dv_thought = map(_empty_rows, call.forward[:5])
    return dq, dk_text, dv_text, dk_thought, dv_thought, new_lse(call.forward.q)


operator = register("thought_attention", _forward, _fake)
backward_operator = register("thought_attention_backward", _backward, _backward_fake)

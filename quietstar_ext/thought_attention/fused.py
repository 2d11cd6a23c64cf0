"""The kernels of thought_attention as raw operators: one kernel for text and slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
from quietstar_ext.thought_attention.call import (
    GRADIENTS,
    RESULTS,
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
            name = str(q.dtype).removeprefix("torch.")
            return (
                f"the CUDA kernels for {name} heads of {size} need {needed} bytes of shared memory in a "
                f"block, and this device has {available}"
            )
    return reason


@torch.compiler.assume_constant_result
def _shared_memory(dtype_code: int, device: int) -> tuple[int, int]:
    """Bytes of it that a block of the largest heads' kernels needs, and may have on the device."""
    size_of = cuda_kernels().cuda_thought_attention_shared_memory
    needed, available = size_of(dtype_code, MAX_HEAD_SIZE, (device, 0))
    return needed, available


def _empty_rows(tensor: Tensor) -> Tensor:
    """Uninitialised, in the memory order of tensor, with the elements of a row side by side."""
    return torch.empty_like(last_contiguous(tensor))


def _laid_out(call: ThoughtAttention) -> ThoughtAttention:
    """The call with its tensors as the kernels read them."""
    rows = [last_contiguous(t) for t in call[:5]]
    ranges = [t.contiguous() for t in call[5:7]]
    sinks = None if call.sinks is None else call.sinks.float().contiguous()
    return ThoughtAttention._make([*rows, *ranges, sinks, *call[8:]])


def _run(name: str, call: ThoughtAttention, out: Tensor, lse: Tensor, *more: Any) -> None:
    """Run a function of the core on the device of the tensors; ``more`` is the backward pass's."""
    call = _laid_out(call)
    q, k_text, _, k_thought, *_ = call
    batch, q_heads, slots, columns, size = q.shape
    heads, length = k_text.shape[1:3]
    on_cuda = takes_cuda_path(q)
    module, prefix = (cuda_kernels(), "cuda_") if on_cuda else (native(), "")
    device = (cuda_device(q),) if on_cuda else ()
    # Whether fp32 products may round to tf32 is CUDA's, the threads are the CPU's.
    tf32 = on_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    taken = fields(
        *(q.dtype, batch, q_heads, heads, slots, k_thought.shape[2], columns, length, size),
        *(*map(place, (*call[:5], out)), lse, call.text_start, call.text_stop, call.sinks),
        *(call.scale, call.window, call.softcap, torch.get_num_threads(), tf32),
    )
    size_of = getattr(module, f"{prefix}thought_attention_workspace")
    needed = size_of((*taken, 0), bool(more), *device)
    workspace = torch.empty(needed, dtype=torch.uint8, device=q.device)
    taken = (*taken, workspace.data_ptr())
    getattr(module, prefix + name)((taken, *more) if more else taken, *device)


def _forward(call: ThoughtAttention) -> tuple[Tensor, Tensor]:
    out, lse = _fake(call)
    _run("thought_attention", call, out, lse)
    return out, lse


def _backward(call: ThoughtAttentionBackward) -> tuple[Tensor, ...]:
    out, lse, dout = last_contiguous(call.out), call.lse.contiguous(), last_contiguous(call.dout)
    dlse = None if call.dlse is None else call.dlse.contiguous()
    *gradients, delta = results = _backward_fake(call)
    more = fields(place(dout), dlse, *map(place, gradients), delta)
    _run("thought_attention_backward", call.forward, out, lse, *more)
    return results


def _fake(call: ThoughtAttention) -> tuple[Tensor, Tensor]:
    return _empty_rows(call.q), new_lse(call.q)


def _backward_fake(call: ThoughtAttentionBackward) -> tuple[Tensor, ...]:
    return (*map(_empty_rows, call.forward[:5]), new_lse(call.forward.q))


operator = register("thought_attention", ThoughtAttention, RESULTS, _forward, _fake)
backward_operator = register(
    "thought_attention_backward", ThoughtAttentionBackward, GRADIENTS, _backward, _backward_fake
)

"""The kernels of thought_attention as raw operators, and the autograd Function around them.

Arguments are those of the public function, checked; ``scale`` is a number, ``window`` and ``softcap``
are 0 where there is none. :func:`fused` is what it calls.
"""

from __future__ import annotations

from typing import Any

import torch

from quietstar_ext.derivatives import first_only
from quietstar_ext.native import (
    DTYPE_CODES,
    cuda_device,
    cuda_kernels,
    native,
    takes_cuda_path,
    why_not_native,
)

# Of the CUDA kernels; and up to which their tiles fit every device (thought_attention_shapes.cuh).
MOST_HEAD_SIZE = 256
FITTING_HEAD_SIZE = 128

_INPUTS = (
    "Tensor q, Tensor k_text, Tensor v_text, Tensor k_thought, Tensor v_thought, "
    "Tensor text_start, Tensor text_stop, Tensor? sinks, "
)
_OPTIONS = "float scale, int window, float softcap"
_SCHEMA = f"({_INPUTS}{_OPTIONS}) -> (Tensor out, Tensor lse)"
_BACKWARD_SCHEMA = (
    f"({_INPUTS}Tensor out, Tensor lse, Tensor dout, Tensor? dlse, {_OPTIONS}) -> (Tensor dq, "
    "Tensor dk_text, Tensor dv_text, Tensor dk_thought, Tensor dv_thought, Tensor delta)"
)


def why_not_fused(q: torch.Tensor) -> str | None:
    """Half a sentence on why no kernel takes these queries, or None where one does."""
    size = q.shape[-1]
    if takes_cuda_path(q) and size > MOST_HEAD_SIZE:
        return f"the CUDA kernels take head sizes up to {MOST_HEAD_SIZE}, not {size}"
    reason = why_not_native(q)
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
    needed, available = size_of(dtype_code, MOST_HEAD_SIZE, device, 0)
    return needed, available


def fused(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the kernels, with gradients where they are wanted."""
    if torch.is_grad_enabled() and any(
        t.requires_grad for t in (q, *rest) if isinstance(t, torch.Tensor)
    ):
        return _ThoughtAttention.apply(q, *rest)
    return torch.ops.quietstar.thought_attention(q, *rest)


class _ThoughtAttention(torch.autograd.Function):
    """out and lse with gradients to the five tensors and to the sinks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k_text: torch.Tensor,
        v_text: torch.Tensor,
        k_thought: torch.Tensor,
        v_thought: torch.Tensor,
        text_start: torch.Tensor,
        text_stop: torch.Tensor,
        sinks: torch.Tensor | None,
        scale: float,
        window: int,
        softcap: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (q, k_text, v_text, k_thought, v_thought, text_start, text_stop, sinks)
        out, lse = torch.ops.quietstar.thought_attention(*inputs, scale, window, softcap)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.options = (scale, window, softcap)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        sinks, dsinks = inputs[7], None
        with torch.no_grad():
            if dout is None:
                dout = torch.zeros_like(out)
            *gradients, delta = torch.ops.quietstar.thought_attention_backward(
                *inputs, out, lse, dout, dlse, *ctx.options
            )
            if sinks is not None and ctx.needs_input_grad[7]:
                # A sink is a logit with the value 0, so its share of the gradient is p (0 - delta).
                p = torch.exp(sinks.float()[:, None, None] - lse)
                p = p.masked_fill(lse == -torch.inf, 0)
                dsinks = -(p * delta).sum((0, 2, 3)).to(sinks.dtype)
        results = first_only("thought_attention", inputs, (*gradients, None, None, dsinks))
        return (*results, None, None, None)


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only where the elements of a row do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def _arguments(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    backward: bool,
) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """What both passes' kernels are given first, and the tensors that must outlive the call."""
    q, k_text, v_text, k_thought, v_thought = (
        _last_contiguous(t) for t in (q, k_text, v_text, k_thought, v_thought)
    )
    text_start, text_stop = text_start.contiguous(), text_stop.contiguous()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    batch, q_heads, slots, columns, size = q.shape
    heads, length = k_text.shape[1:3]
    sizes = (batch, q_heads, heads, slots, k_thought.shape[2], columns, length, size)
    code = DTYPE_CODES[q.dtype]
    # The last argument: CUDA's is whether fp32 products may round to tf32, the CPU's its threads.
    last: int
    if takes_cuda_path(q):
        last = torch.backends.cuda.matmul.fp32_precision == "tf32"
        size_of = cuda_kernels().cuda_thought_attention_workspace
        needed = size_of(code, sizes, backward, *cuda_device(q))
    else:
        last = torch.get_num_threads()
        needed = native().thought_attention_workspace(sizes, backward, last)
    workspace = torch.empty(needed, dtype=torch.uint8, device=q.device)
    arguments = (
        code,
        sizes,
        _place(q),
        _place(k_text),
        _place(v_text),
        _place(k_thought),
        _place(v_thought),
        _place(out),
        lse.data_ptr(),
        text_start.data_ptr(),
        text_stop.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        scale,
        window,
        softcap,
        workspace.data_ptr(),
        last,
    )
    alive = [q, k_text, v_text, k_thought, v_thought, text_start, text_stop, workspace]
    return arguments, alive if sinks is None else [*alive, sinks]


def _run(name: str, q: torch.Tensor, *arguments: Any) -> None:
    """The function of the core of this name, on q's device."""
    if takes_cuda_path(q):
        getattr(cuda_kernels(), f"cuda_{name}")(*arguments, *cuda_device(q))
    else:
        getattr(native(), name)(*arguments)


def _empty_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised, in the memory order of tensor, with the elements of a row side by side."""
    return torch.empty_like(_last_contiguous(tensor))


def _forward(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = _empty_rows(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    arguments, alive = _arguments(
        q,
        k_text,
        v_text,
        k_thought,
        v_thought,
        text_start,
        text_stop,
        sinks,
        out,
        lse,
        scale,
        window,
        softcap,
        backward=False,
    )
    _run("thought_attention", q, *arguments)
    del alive
    return out, lse


def _backward(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, ...]:
    out, lse, dout = _last_contiguous(out), lse.contiguous(), _last_contiguous(dout)
    if dlse is not None:
        dlse = dlse.contiguous()
    gradients = [_empty_rows(t) for t in (q, k_text, v_text, k_thought, v_thought)]
    delta = torch.empty_like(lse)
    arguments, alive = _arguments(
        q,
        k_text,
        v_text,
        k_thought,
        v_thought,
        text_start,
        text_stop,
        sinks,
        out,
        lse,
        scale,
        window,
        softcap,
        backward=True,
    )
    _run(
        "thought_attention_backward",
        q,
        *arguments,
        _place(dout),
        0 if dlse is None else dlse.data_ptr(),
        *(_place(gradient) for gradient in gradients),
        delta.data_ptr(),
    )
    del alive
    return (*gradients, delta)


def _fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_rows(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward_fake(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    gradients = (_empty_rows(t) for t in (q, k_text, v_text, k_thought, v_thought))
    return (*gradients, q.new_empty(q.shape[:-1], dtype=torch.float32))


torch.library.define("quietstar::thought_attention", _SCHEMA)
torch.library.impl("quietstar::thought_attention", ("cpu", "cuda"), _forward)
torch.library.register_fake("quietstar::thought_attention", _fake)
torch.library.define("quietstar::thought_attention_backward", _BACKWARD_SCHEMA)
torch.library.impl("quietstar::thought_attention_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("quietstar::thought_attention_backward", _backward_fake)

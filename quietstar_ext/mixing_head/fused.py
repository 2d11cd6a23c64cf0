"""The operators of mixing_head, with first derivatives."""

from __future__ import annotations

from typing import Any

import torch

from quietstar_ext.derivatives import first_only, refuse_batched
from quietstar_ext.mixing_head import cpu, cuda
from quietstar_ext.mixing_head.call import Mixed, MixingHead, MixingHeadBackward
from quietstar_ext.native import native_unsupported_reason, takes_cuda_path
from quietstar_ext.operators import register


def fused_unsupported_reason(thought: torch.Tensor) -> str | None:
    reason = native_unsupported_reason(thought)
    if reason is None and takes_cuda_path(thought):
        max_width = cuda.max_width(thought.device)
        if thought.shape[1] > max_width:
            return (
                f"the CUDA kernel takes widths up to {max_width} on this device, not {thought.shape[1]}"
            )
    return reason


def fused(call: MixingHead) -> tuple[torch.Tensor, torch.Tensor]:
    """mixed [rows, d] and w [rows, 1]."""
    mixed, w = _MixingHead.apply(call.sigmoid, *call[:8])
    return mixed, w


class _MixingHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sigmoid: bool, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mixed, w, *kept = forward_operator(*tensors, sigmoid)
        ctx.save_for_backward(*tensors, *kept)
        ctx.sigmoid = sigmoid
        return mixed, w

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        refuse_batched("mixing_head", grads[0])
        wanted = ctx.needs_input_grad[1:8]
        tensors, kept = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        with torch.no_grad():
            results = backward_operator(*tensors, ctx.sigmoid, *kept, *grads, wanted)
        shown = [g if want else None for g, want in zip(results, wanted, strict=True)]
        return (None, *first_only("mixing_head", tensors[:7], shown), None)


def _forward(call: MixingHead) -> Mixed:
    return (cuda if takes_cuda_path(call.thought) else cpu).forward(call)


def _backward(call: MixingHeadBackward) -> list[torch.Tensor]:
    """Gradients of base, thought, w1, b1, w2, b2 and w3; empty where not wanted."""
    forward = call.forward
    if forward.thought.numel() == 0:
        return [
            forward.base.new_zeros(shape if want else (0,))
            for shape, want in zip(forward.gradient_shapes(), call.wanted, strict=True)
        ]
    results = (cuda if takes_cuda_path(forward.thought) else cpu).backward(call)
    return [
        result if want and result is not None else forward.base.new_empty(0)
        for result, want in zip(results, call.wanted, strict=True)
    ]


def _fake(call: MixingHead) -> Mixed:
    thought, rows = call.thought, call.thought.shape[0]
    mixed, h1, h2 = (thought.new_empty(thought.shape) for _ in range(3))
    return Mixed(mixed, thought.new_empty(rows, 1), thought.new_empty(rows, dtype=torch.float32), h1, h2)


def _backward_fake(call: MixingHeadBackward) -> list[torch.Tensor]:
    return [
        call.forward.base.new_empty(shape if want else (0,))
        for shape, want in zip(call.forward.gradient_shapes(), call.wanted, strict=True)
    ]


forward_operator = register(
    "mixing_head_forward",
    MixingHead,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
backward_operator = register(
    "mixing_head_backward", MixingHeadBackward, "Tensor[]", _backward, _backward_fake
)

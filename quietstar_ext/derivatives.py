"""What the kernels cannot differentiate: second derivatives, forward mode, and torch.func's transforms.

The autograd Functions of this package have first derivatives in backward mode. A second derivative is an
error instead of left out silently, and calls inside a transform take the PyTorch reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad


def derivatives_unsupported_reason(*tensors: object) -> str | None:
    """Half a sentence on why no kernel can serve this call, or None where one can."""
    if torch.compiler.is_compiling():
        return None
    # There is no public question for either; autograd.Function asks the first in the same way.
    if torch._C._are_functorch_transforms_active():
        return "torch.func's transforms (grad, vmap, jvp, ...) cannot look into a kernel"
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    ):
        return "the kernels have no forward-mode derivatives"
    return None


def in_vmap() -> bool:
    """Whether the call is made under ``torch.func.vmap``."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key() == vmap for interpreter in stack)


def reject_batched(operator: str, gradient: torch.Tensor) -> None:
    """``RuntimeError`` for a batched gradient (``torch.autograd.grad(..., is_grads_batched=True)``)."""
    if torch.compiler.is_compiling():
        return
    if in_vmap() or torch._C._functorch.is_legacy_batchedtensor(gradient):
        raise RuntimeError(
            f"{operator}: the kernel's backward pass cannot be batched by vmap; call it with"
            " impl='reference'"
        )


def first_only(
    operator: str, inputs: Sequence[torch.Tensor | None], gradients: Sequence[Any]
) -> list[Any]:
    """The gradients that a backward pass computed, which cannot be differentiated themselves.

    Where the pass was called with ``create_graph=True`` they hang from the inputs in the graph, so that
    a second derivative that runs through this operator raises ``RuntimeError``.

    Args:
        inputs: of the forward pass, those that may require a gradient among them.
        gradients: tensors, or None where none was wanted.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return list(gradients)
    there = [gradient for gradient in gradients if gradient is not None]
    hung_from = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    guarded = iter(_FirstOnly.apply(operator, len(there), *there, *hung_from))
    return [None if gradient is None else next(guarded) for gradient in gradients]


class _FirstOnly(torch.autograd.Function):
    """Identity on the gradients, whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, operator: str, count: int, *tensors: torch.Tensor) -> Any:
        ctx.operator = operator
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.operator}: the kernel has no second derivatives; call it with impl='reference'"
        )

"""The kernels of thought_attention with first derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quietstar_ext.derivatives import first_only
from quietstar_ext.thought_attention import composed, fused
from quietstar_ext.thought_attention.call import TENSORS, ThoughtAttention


def attend(call: ThoughtAttention, is_composed: bool) -> tuple[Tensor, Tensor]:
    """out and lse of the fused or the composed path, with gradients where they are wanted."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in call):
        return _ThoughtAttention.apply(is_composed, call[TENSORS:], *call[:TENSORS])
    return (composed if is_composed else fused).operator(*call)


class _ThoughtAttention(torch.autograd.Function):
    """out and lse with gradients to the five tensors and to the sinks."""

    @staticmethod
    def forward(
        ctx: Any, is_composed: bool, options: tuple[float, int, float], *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = (composed if is_composed else fused).operator(*tensors, *options)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.is_composed, ctx.options = is_composed, options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        sinks, dsinks = inputs[7], None
        # The stock backward cannot take a gradient of lse.
        backward = (composed if ctx.is_composed and dlse is None else fused).backward_operator
        with torch.no_grad():
            if dout is None:
                dout = torch.zeros_like(out)
            *gradients, delta = backward(*inputs, *ctx.options, out, lse, dout, dlse)
            if sinks is not None and ctx.needs_input_grad[2 + 7]:
                # A sink is a logit with the value 0, so its share of the gradient is p (0 - delta).
                p = torch.exp(sinks.float()[:, None, None] - lse)
                p = p.masked_fill(lse == -torch.inf, 0)
                dsinks = -(p * delta).sum((0, 2, 3)).to(sinks.dtype)
        results = first_only("thought_attention", inputs, (*gradients, None, None, dsinks))
        return (None, None, *results)

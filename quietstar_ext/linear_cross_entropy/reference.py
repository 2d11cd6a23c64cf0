"""Cross entropy of a linear layer's outputs, in plain PyTorch (holds rows x vocabulary)."""

from __future__ import annotations

import torch

from quietstar_ext.linear_cross_entropy.call import LinearCrossEntropy
from quietstar_ext.precision import compute_dtype


def reference(call: LinearCrossEntropy) -> torch.Tensor:
    """Return nll [rows]."""
    hidden, weight, targets, banned, temperature, ignore_index, softcap, logit_scale = call
    ignored = targets == ignore_index
    targets = targets.masked_fill(ignored, 0)[:, None]
    # An ignored row may hold anything; masked before the product, its inf cannot reach weight.
    hidden = hidden.to(compute_dtype(hidden.dtype)).masked_fill(ignored[:, None], 0)
    logits = (hidden @ weight.to(hidden.dtype).T) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    if banned is not None:
        logits = logits.index_fill(1, banned, -torch.inf)
    nll = -torch.log_softmax(logits, 1).gather(1, targets)[:, 0]
    return nll.masked_fill(ignored, 0)


def reference_sum(
    call: LinearCrossEntropy, row_weights: torch.Tensor, skip_zero_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (Σ row_weights · nll, nll [rows] detached)."""
    without_weight = row_weights == 0
    if skip_zero_weight:
        call = call._replace(targets=call.targets.masked_fill(without_weight, call.ignore_index))
    nll = reference(call)
    weighted = row_weights.detach().to(nll.dtype) * nll.masked_fill(without_weight, 0)
    return weighted.sum(), nll.detach()

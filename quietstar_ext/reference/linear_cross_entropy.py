"""Cross entropy of a linear layer's outputs, in plain PyTorch (holds rows x vocabulary)."""

from __future__ import annotations

import torch

from quietstar_ext.precision import compute_dtype


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """Return nll [rows]; arguments as in the public function, ``banned`` a tensor or None."""
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


def linear_cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    *,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    skip_zero_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (Σ row_weights · nll, nll [rows] detached); arguments as in the public function."""
    without_weight = row_weights == 0
    if skip_zero_weight:
        targets = targets.masked_fill(without_weight, ignore_index)
    nll = linear_cross_entropy(
        hidden,
        weight,
        targets,
        temperature=temperature,
        banned=banned,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    weighted = row_weights.detach().to(nll.dtype) * nll.masked_fill(without_weight, 0)
    return weighted.sum(), nll.detach()

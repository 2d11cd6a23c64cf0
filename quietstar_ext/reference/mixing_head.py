"""The mixing head, in plain PyTorch."""

from __future__ import annotations

import torch

from quietstar_ext.precision import compute_dtype


def mixing_head(
    base: torch.Tensor,
    thought: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    w3: torch.Tensor,
    activation: str = "identity",
    *,
    base_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mixed [rows, d] and w [rows, 1]; arguments as in the public function."""
    given, dtype = thought.dtype, compute_dtype(thought.dtype)
    base, thought, w1, b1, w2, b2, w3 = (t.to(dtype) for t in (base, thought, w1, b1, w2, b2, w3))
    size = base.shape[1]
    from_base = base @ w1[:, :size].T + b1
    if base_index is not None:
        base, from_base = base.index_select(0, base_index), from_base.index_select(0, base_index)
    hidden = torch.relu(from_base + thought @ w1[:, size:].T)
    hidden = torch.relu(hidden @ w2.T + b2)
    w = hidden @ w3.T
    if activation == "sigmoid":
        w = torch.sigmoid(w)
    return ((1 - w) * base + w * thought).to(given), w.to(given)

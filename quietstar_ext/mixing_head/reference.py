"""The mixing head, in plain PyTorch."""

from __future__ import annotations

import torch

from quietstar_ext.mixing_head.call import MixingHead
from quietstar_ext.precision import compute_dtype


def reference(call: MixingHead) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mixed [rows, d] and w [rows, 1]."""
    dtype = compute_dtype(call.thought.dtype)
    base, thought, w1, b1, w2, b2, w3 = (t.to(dtype) for t in call[:7])
    size = base.shape[1]
    from_base = base @ w1[:, :size].T + b1
    if call.base_index is not None:
        base, from_base = (t.index_select(0, call.base_index) for t in (base, from_base))
    hidden = torch.relu(from_base + thought @ w1[:, size:].T)
    hidden = torch.relu(hidden @ w2.T + b2)
    w = hidden @ w3.T
    if call.sigmoid:
        w = torch.sigmoid(w)
    given = call.thought.dtype
    return ((1 - w) * base + w * thought).to(given), w.to(given)

"""Which dtype an operator computes in, and how it behaves under autocast."""

from __future__ import annotations

import contextlib

import torch

# Asked once: torch.compile cannot look through the question in every release.
_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")
    if torch.amp.is_autocast_available(kind)
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a sum over rows that will be scaled later: until then it may overflow float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of matrices of up to 32 bits, accumulated and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":  # a test: PyTorch has this product on devices only
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def autocast_inputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to autocast's dtype where autocast is on, as it would for the matrix product inside.

    Without this, bf16 hidden states meet fp32 parameters in mixed-precision training. float64 is
    left alone.
    """
    kind = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    if kind not in _AUTOCAST or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype != torch.float64 else t for t in tensors
    )


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """A block in which matrix products keep the dtype of their operands."""
    kind = tensor.device.type
    if kind not in _AUTOCAST:  # tensors without memory, for one
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)

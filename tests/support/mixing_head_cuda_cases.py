"""mixing_head on a GPU and by hand, for the tests of its CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from mixing_head_cases import gradients, make
from torch import Tensor

from quietstar_ext import mixing_head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def moved(case: tuple[list[Tensor], Tensor | None], device: str) -> tuple[list[Tensor], Tensor | None]:
    tensors, index = case
    there = [t.detach().to(device).requires_grad_() for t in tensors]
    return there, None if index is None else index.to(device)


def make_with_large_biases(
    positions: int, rows: int, size: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor | None]:
    """They keep the arguments of relu away from 0, where the last bit of a sum, in whatever order it is
    taken, switches a whole term of the gradient on or off."""
    tensors, index = moved(make(positions, rows, size, True, dtype=dtype), device)
    with torch.no_grad():
        tensors[4].div_(8)
        for bias in (tensors[3], tensors[5]):
            bias.copy_(6 * torch.randn_like(bias).sign())
    return tensors, index


def fused(tensors: list[Tensor], activation: str, index: Tensor | None) -> list[Tensor]:
    """mixed, w, and the gradients of the seven inputs."""
    outputs = mixing_head(*tensors, activation, base_index=index, impl="fused")
    return [*outputs, *gradients(outputs, tensors)]


def truth(tensors: list[Tensor], activation: str, index: Tensor | None) -> list[Tensor]:
    exact = [t.detach().double().requires_grad_() for t in tensors]
    outputs = mixing_head(*exact, activation, base_index=index, impl="reference")
    return [*outputs, *gradients(outputs, exact)]

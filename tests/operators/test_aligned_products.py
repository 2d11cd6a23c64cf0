"""On CUDA, 16-bit products over a vocabulary that is no multiple of 8 are those of its aligned part and
a tail: unaligned ones take kernels of half the speed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from quietstar.thinking.output_layer import OutputLayer
from quietstar_ext import linear_cross_entropy, linear_cross_entropy_sum, linear_sample
from quietstar_ext.aligned_products import aligned_parts, hidden_product, vocabulary_product
from quietstar_ext.linear_entropy import linear_entropy_sum

ROWS, WIDTH = 24, 16


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The lengths of every matrix product, as they are made."""
    seen: list[set[int]] = []

    def watch(of: Any, name: str, first: int) -> None:
        real = getattr(of, name)

        def product(*args: Any, **kwargs: Any) -> Any:
            seen.append({length for matrix in args[first : first + 2] for length in matrix.shape})
            return real(*args, **kwargs)

        monkeypatch.setattr(of, name, product)

    watch(torch, "mm", 0)
    watch(torch, "addmm", 1)
    watch(torch.Tensor, "addmm_", 1)
    watch(torch.Tensor, "__matmul__", 0)
    return seen


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    targets = torch.randint(0, weight.shape[0], (ROWS,))
    linear_cross_entropy(hidden, weight, targets, impl="fused").sum().backward()


def cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    targets = torch.randint(0, weight.shape[0], (ROWS,))
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, torch.rand(ROWS), impl="fused")
    loss.backward()


def sample(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    linear_sample(hidden, weight, seed=0, impl="fused")


def entropy_sum(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    linear_entropy_sum(hidden, weight, torch.rand(ROWS)).backward()


@torch.no_grad()
def logits(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    layer = OutputLayer(weight, softcap=None, logit_scale=0.5)
    assert layer.logits(hidden[0]).shape == (len(weight),)
    made = layer.logits(hidden.view(4, -1, WIDTH))
    wanted = torch.nn.functional.linear(hidden, weight) * 0.5
    torch.testing.assert_close(made, wanted.view(4, -1, len(weight)))


CALLS = {cross_entropy: 3, cross_entropy_sum: 3, entropy_sum: 3, sample: 1, logits: 2}


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("vocab", [130, 1003])
def test_products_are_aligned(
    cuda_on_cpu: ModuleType,
    lengths: list[set[int]],
    call: Callable[[torch.Tensor, torch.Tensor], None],
    vocab: int,
) -> None:
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    call(hidden, weight)
    aligned, tail = vocab // 8 * 8, vocab % 8
    assert all(product <= {1, ROWS, WIDTH, aligned, tail} for product in lengths), lengths
    assert sum(aligned in product for product in lengths) == CALLS[call]
    assert sum(tail in product for product in lengths) == CALLS[call]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 7, 8, 17, 130])
def test_the_parts_are_the_whole(vocab: int, dtype: torch.dtype) -> None:
    parts = aligned_parts(vocab, dtype)
    assert [*range(vocab)] == [token for part in parts for token in range(vocab)[part]]
    assert len(parts) == (2 if vocab in (17, 130) and dtype.itemsize == 2 else 1)
    if dtype == torch.float32:  # one product as ever
        return
    hidden, weight = torch.randn(5, 24).to(dtype), torch.randn(vocab, 24).to(dtype)
    out = torch.full((5, vocab + 3), torch.nan, dtype=dtype)
    logits = vocabulary_product(hidden, weight, out[:, :vocab])
    assert torch.equal(logits, hidden @ weight.T) and out[:, vocab:].isnan().all()
    back = hidden_product(logits, weight, torch.full((5, 24), torch.nan, dtype=dtype))
    wanted = logits.double() @ weight.double()
    # Rounded once, but for a tail of seven at most.
    error = (back.double() - wanted).abs()
    bound = torch.finfo(dtype).eps * (wanted.abs() + 0.1 * logits.abs().double() @ weight.abs().double())
    assert (error <= bound).all()

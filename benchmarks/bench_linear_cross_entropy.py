"""linear_cross_entropy, forward and backward, against its bare matrix products and what else there is.

2048 x 256 onto 8192: the small model's training step; 2048 x 1024 onto 32000: a Llama-2 vocabulary.
The bare products are the three that any exact implementation needs, on full matrices: the logits, and
the gradients of hidden and weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import compare, show, write
from quietstar_ext import linear_cross_entropy, linear_cross_entropy_sum

SHAPES = [(2048, 256, 8192), (2048, 1024, 32_000)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_tables: dict[str, Any] = {}


class _ChunkedInForward(torch.autograd.Function):
    """Liger's approach in PyTorch: gradients in the forward pass, chunk by chunk, from F.cross_entropy's
    parts; as many chunks as the vocabulary is wider than the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = hidden.shape[0]
        size = -(-rows * hidden.shape[1] // weight.shape[0])
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, rows, size):
            part = slice(start, start + size)
            logits = (hidden[part] @ weight.T).float()
            logprobs = logits.log_softmax(-1)
            loss -= logprobs.gather(1, targets[part, None]).sum()
            gradient = logprobs.exp_()
            gradient[torch.arange(len(gradient)), targets[part]] -= 1
            gradient = gradient.div_(rows).to(hidden.dtype)
            grad_hidden[part] = gradient @ weight
            grad_weight.addmm_(gradient.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grads[0] * grad_hidden, grads[0] * grad_weight, None


def contestants(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    rows, width, vocabulary = shape
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    row_weights = torch.full((rows,), 1 / rows)
    h, w = hidden.detach(), weight.detach()
    ours = {"impl": "fused"}

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            loss().backward()

        return run

    def products() -> tuple[Tensor, Tensor]:
        logits = h @ w.T
        return logits @ w, logits.T @ h

    def reference() -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, impl="reference").mean()

    return {
        "linear_cross_entropy_sum": step(
            lambda: linear_cross_entropy_sum(hidden, weight, targets, row_weights, **ours)[0]
        ),
        "linear_cross_entropy, mean": step(
            lambda: linear_cross_entropy(hidden, weight, targets, **ours).mean()
        ),
        "its three bare products": products,
        "F.cross_entropy of full logits": step(
            lambda: cross_entropy((hidden @ weight.T).float(), targets)
        ),
        "chunked as in liger-kernel": step(lambda: _ChunkedInForward.apply(hidden, weight, targets)),
        "reference": step(reference),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_cross_entropy(benchmark: Any, shape: tuple[int, int, int], dtype: str) -> None:
    rows, width, vocabulary = shape
    large = rows * width * vocabulary > 2**34
    runs = contestants(shape, DTYPES[dtype])
    benchmark.pedantic(runs["linear_cross_entropy_sum"], rounds=1 if large else 5)
    results = compare(runs, rounds=3 if large else 7)
    ours, bare = results["linear_cross_entropy_sum"], results["its three bare products"]
    benchmark.extra_info.update({key: row["times_ours"] for key, row in results.items()})
    title = f"linear_cross_entropy, forward and backward, {rows} x {width} onto {vocabulary} {dtype}"
    show(title, results)
    gigaflop = 6e-9 * rows * width * vocabulary
    print(f"  {gigaflop:.1f} GFLOP, {gigaflop / ours['best_ms'] * 1e3:.0f} GFLOP/s at best")
    print(f"  {1 / bare['times_ours']:.2f} times its bare products")
    _tables[title] = results
    write("linear_cross_entropy", _tables)

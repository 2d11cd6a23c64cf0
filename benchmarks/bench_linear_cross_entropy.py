"""linear_cross_entropy, forward and backward, against its bare matrix products and what else there is.

On a CPU
- 2048 x 256 onto 8192: the small model's training step; 1024 x 576 onto 49152: SmolLM2-135M's;
  2048 x 1024 onto 32000: a Llama-2 vocabulary.
On a GPU
- 8192 x 4096 onto 32,000 and 128,256: rows of a training step at the width and the vocabularies of
  Mistral 7B and Llama 3; 8192 x 1024 onto 128,256, where the products hide less of the rest.
The bare products are the three that any exact implementation needs, on full matrices: the logits, and
the gradients of hidden and weight.

On a GPU also the step between the products alone, in GB/s against a copy, and the whole for several
sizes of the workspace, which decides how many rows make a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import DEVICE, ON_GPU, compare, device, finished, needs_gpu, record
from quietstar_ext import linear_cross_entropy, linear_cross_entropy_sum
from quietstar_ext.linear_cross_entropy import cuda
from quietstar_ext.linear_cross_entropy.softmax import SoftmaxCrossEntropy

pytestmark = pytest.mark.device

SHAPES = (
    [(8192, 4096, 32_000), (8192, 4096, 128_256), (8192, 1024, 128_256)]
    if ON_GPU
    else [(2048, 256, 8192), (1024, 576, 49_152), (2048, 1024, 32_000)]
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
if ON_GPU:
    del DTYPES["float32"]
STEM = "linear_cross_entropy"
PRODUCTS = "its three bare products"


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


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, width, vocabulary = shape
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=DEVICE).div_(width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    return hidden, weight.requires_grad_(), targets


def contestants(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    hidden, weight, targets = _inputs(shape, dtype)
    rows = shape[0]
    row_weights = torch.full((rows,), 1 / rows, device=DEVICE)
    h, w = hidden.detach(), weight.detach()

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            loss().backward()

        return run

    def products() -> tuple[Tensor, Tensor]:
        logits = h @ w.T
        return logits @ w, logits.T @ h

    def ours(**options: Any) -> Callable[[], None]:
        return step(
            lambda: linear_cross_entropy_sum(
                hidden, weight, targets, row_weights, impl="fused", **options
            )[0]
        )

    def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy((hidden @ weight.T).float(), targets)

    found: dict[str, Callable[[], object]] = {
        "linear_cross_entropy_sum": ours(),
        "linear_cross_entropy, mean": step(
            lambda: linear_cross_entropy(hidden, weight, targets, impl="fused").mean()
        ),
        PRODUCTS: products,
        "F.cross_entropy of full logits": step(lambda: full(hidden, weight, targets)),
        "chunked as in liger-kernel": step(lambda: _ChunkedInForward.apply(hidden, weight, targets)),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13 and later
        chunked = functools.partial(
            torch.nn.functional.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()
        )
        found["F.linear_cross_entropy, chunked"] = step(lambda: chunked(hidden, weight, targets))
    if not ON_GPU:
        found["reference"] = step(
            lambda: linear_cross_entropy(hidden, weight, targets, impl="reference").mean()
        )
        return found
    found["weight's gradient summed in float32"] = ours(accumulate="float32")
    compiled = torch.compile(full)
    found["torch.compile of F.cross_entropy"] = step(lambda: compiled(hidden, weight, targets))
    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger-kernel"] = step(lambda: liger(weight, hidden, targets))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_cross_entropy(benchmark: Any, shape: tuple[int, int, int], dtype: str) -> None:
    rows, width, vocabulary = shape
    large = rows * width * vocabulary > 2**34
    runs = contestants(shape, DTYPES[dtype])
    benchmark.pedantic(finished(runs["linear_cross_entropy_sum"]), rounds=1 if large else 5)
    results = compare(runs, rounds=3 if large else 7)
    if ON_GPU:
        for name, row in results.items():
            row["peak_mb"] = device.peak_mb(runs[name])
    title = f"linear_cross_entropy, forward and backward, {rows} x {width} onto {vocabulary} {dtype}"
    record(STEM, title, results, benchmark, gflop=6e-9 * rows * width * vocabulary)
    print(f"  {1 / results[PRODUCTS]['times_ours']:.3f} times its bare products")


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def bench_workspace(benchmark: Any, shape: tuple[int, int, int], monkeypatch: Any) -> None:
    """How long the whole takes with chunks of fewer rows, and of more."""
    rows, width, vocabulary = shape
    hidden, weight, targets = _inputs(shape, torch.bfloat16)
    row_weights = torch.full((rows,), 1 / rows, device=DEVICE)

    def with_workspace(megabytes: int) -> Callable[[], None]:
        def run() -> None:
            monkeypatch.setattr(cuda, "WORKSPACE_BYTES", megabytes * 2**20)
            hidden.grad = weight.grad = None
            loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl="fused")
            loss.backward()

        return run

    runs = {f"{size} MiB": with_workspace(size) for size in (256, 32, 64, 128, 512, 1024)}
    benchmark.pedantic(finished(runs["256 MiB"]), rounds=1)
    results = compare(runs, rounds=3)
    title = f"linear_cross_entropy by workspace, {rows} x {width} onto {vocabulary} bfloat16"
    record(STEM, title, results)


@needs_gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(4096, 32_000), (1024, 128_256)], ids=str)
def bench_softmax_cross_entropy(
    benchmark: Any, shape: tuple[int, int], dtype: str, softcap: float | None
) -> None:
    """The step between the products: logits read and their gradients written once."""
    rows, words = shape
    logits = torch.randn(rows, words, device=DEVICE).to(getattr(torch, dtype))
    other = torch.empty_like(logits)
    targets = torch.randint(0, words, (rows,), device=DEVICE)
    # Gradients of about 1: the next run finds logits that are no stranger than these.
    row_weights = torch.full((rows,), float(words), device=DEVICE)
    nll = torch.empty(rows, device=DEVICE)
    softmax = SoftmaxCrossEntropy(logits, None, 1.0, softcap, 1.0)
    kernel = cuda._Kernel(softmax, logits.T)

    def in_torch() -> Tensor:
        return torch.softmax(logits.float(), 1).to(logits.dtype)

    runs: dict[str, Callable[[], object]] = {
        "loss and gradient": lambda: kernel(logits, targets, None, nll, row_weights),
        "loss alone": lambda: kernel(logits, targets, None, nll, None),
        "a copy of the logits": lambda: other.copy_(logits),
        "softmax": in_torch,
    }
    benchmark.pedantic(finished(runs["loss and gradient"]), rounds=5)
    results = compare(runs)
    capped = "" if softcap is None else ", softcap"
    title = f"softmax cross entropy in place, {rows} x {words} {dtype}{capped}"
    record(STEM, title, results, megabytes=2e-6 * logits.nbytes)

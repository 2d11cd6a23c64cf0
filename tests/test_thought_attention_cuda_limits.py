"""thought_attention's CUDA kernels where small tensors show nothing: long texts of large logits, blocks
that have nothing to read, orders of threads that are far apart, devices with less shared memory."""

from __future__ import annotations

import pytest
import torch
from attention_budget import case

from quietstar_ext.thought_attention import thought_attention


@pytest.fixture
def device(kernel_device: str) -> str:
    return kernel_device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_do_not_drift_over_a_long_text(device: str, dtype: torch.dtype) -> None:
    """What was summed before a tile keeps its weight bit for bit where the tile has no new maximum."""
    heads = 160 if device == "cuda" else 3  # so many that no text is split
    length, size = 16384 if device == "cuda" else 4096, 32
    q = (10 * torch.randn(1, heads, 1, 1, size)).to(device, dtype)
    k, v = torch.randn(2, 1, heads, length, size).to(device, dtype)
    empty = q.new_empty(1, heads, 0, 1, size)
    stop = torch.full((1, 1), length, dtype=torch.int32, device=device)
    start = torch.zeros_like(stop)
    call = {"return_lse": True, "impl": "fused"}
    out, lse = thought_attention(q, k, v, empty, empty, start, stop, **call)
    scores = (q[:, :, 0].double() @ k.double().mT) * size**-0.5
    assert float(scores.std()) > 5
    exact = scores.logsumexp(-1).view_as(lse)
    # Rounding lse itself is up to 6e-8 of it; 128 tiles that drift come to ten times as much.
    torch.testing.assert_close(lse.double(), exact, rtol=1.5e-7, atol=1e-6)
    wanted = (scores.softmax(-1) @ v.double()).view_as(out)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_without_keys(
    device: str, dtype: torch.dtype, seed: int, request: pytest.FixtureRequest
) -> None:
    """A block that has nothing to multiply still waits for all its queries before it writes there."""
    if device == "cpu":
        request.getfixturevalue("cuda_on_cpu").set_order("uneven", seed)
    tensors, *_ = case((1, 4, 2, 1, 0, 150, 150, 32), dtype, device)
    nothing = torch.zeros(1, 150, dtype=torch.int32, device=device)
    out, lse = thought_attention(*tensors, nothing, nothing, return_lse=True, impl="fused")
    assert not out.any() and (lse == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert not grad.any()

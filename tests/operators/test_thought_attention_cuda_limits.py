"""thought_attention's CUDA kernels where small tensors show nothing: long texts of large logits, blocks
that have nothing to read, orders of threads that are far apart, devices with less shared memory."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from attention_budget import assert_within_budget, case

from quietstar_ext.thought_attention import thought_attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_do_not_drift_over_a_long_text(device: str, dtype: torch.dtype) -> None:
    """What was summed before a tile keeps its weight bit for bit where the tile has no new maximum."""
    heads = 160 if device == "cuda" else 8  # so many that no text is split
    length, size = 16384 if device == "cuda" else 4096, 32
    # Of so few bits that the logits are exact.
    q = ((40 * torch.randn(1, heads, 1, 1, size)).round().clamp(-255, 255) / 4).to(device, dtype)
    k, v = ((16 * torch.randn(2, 1, heads, length, size)).round() / 16).to(device, dtype)
    empty = q.new_empty(1, heads, 0, 1, size)
    stop = torch.full((1, 1), length, dtype=torch.int32, device=device)
    start = torch.zeros_like(stop)
    call = {"return_lse": True, "impl": "fused"}
    out, lse = thought_attention(q, k, v, empty, empty, start, stop, **call)
    scores = (q[:, :, 0].double() @ k.double().mT) * size**-0.5
    assert float(scores.std()) > 5
    exact = scores.logsumexp(-1).view_as(lse)
    # Rounding it comes to some 6e-8; 128 tiles that drift come to 7e-7 in half of the heads.
    torch.testing.assert_close(lse.double(), exact, rtol=2e-7, atol=0)
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


# Of shared memory in a block: an RTX 3090 or 4090, an A10 or L4; an A100.
LIMITS = (99 * 1024, 163 * 1024)


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize(
    ("dtype", "size", "limit"),
    [
        (dtype, size, limit)
        for dtype in (torch.bfloat16, torch.float32)
        for size in (64, 96, 128, 256)
        for limit in LIMITS
        if (dtype, size, limit) != (torch.float32, 256, LIMITS[0])  # as the next test shows
    ],
    ids=str,
)
def test_head_sizes_fit_the_device(
    cuda_on_cpu: ModuleType, dtype: torch.dtype, size: int, limit: int
) -> None:
    """Several tiles of rows, keys and slots, sorted so that most tiles are seen as a whole."""
    cuda_on_cpu.set_shared_memory_limit(limit)
    tensors, start, stop, options = case((1, 4, 1, 5, 5, 9, 75, size, {"sinks": True}), dtype, "cpu")
    stop = stop.sort(-1).values
    start = torch.minimum(start, stop // 4).int()
    assert_within_budget(tensors, start, stop, options)


@pytest.mark.cuda_on_cpu
def test_what_does_not_fit_the_device_is_said_before_a_launch(cuda_on_cpu: ModuleType) -> None:
    tensors, start, stop, _ = case((1, 1, 1, 1, 1, 2, 3, 130), torch.float32, "cpu")
    cuda_on_cpu.set_shared_memory_limit(LIMITS[0])
    before = cuda_on_cpu.launches()
    reason = (
        "float32 heads of 130 need 13.... bytes of shared memory in a block, and this device has 101376"
    )
    with pytest.raises(RuntimeError, match=reason):
        thought_attention(*tensors, start, stop, impl="fused")
    out = thought_attention(*tensors, start, stop)
    assert torch.equal(out, thought_attention(*tensors, start, stop, impl="reference"))
    with pytest.raises(
        ValueError, match="need 13.... bytes of shared memory in a block; the device has 101376"
    ):
        torch.ops.quietstar.thought_attention(*tensors, start, stop, None, 1.0, 0, 0.0)
    assert cuda_on_cpu.launches() == before
    cuda_on_cpu.set_shared_memory_limit(LIMITS[1])
    thought_attention(*tensors, start, stop, impl="fused")
    assert cuda_on_cpu.launches() == before + 1

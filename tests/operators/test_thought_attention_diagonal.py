"""The composed path's kernel of the slots alone, on the CPU (cuda_on_cpu) and on a device (gpu)."""

from __future__ import annotations

import mmap

import pytest
import torch
from attention_budget import ROUNDING, budget, reference
from attention_cases import make
from places import CUDA, CUDA_ON_CPU, place_fixture

from quietstar_ext.thought_attention.composed import (
    ThoughtDiagonal,
    ThoughtDiagonalBackward,
    diagonal_backward,
    diagonal_forward,
)

DTYPES = list(ROUNDING)

cuda_place = place_fixture((CUDA_ON_CPU, CUDA))


def diagonal(tensors, scale, sinks=None, text=None, shift=0):
    """Forward and backward of the kernel into tensors that hold NaN; ``shift`` elements unaligned."""

    def place(like, dtype=None):
        dtype = dtype or like.dtype
        empty = torch.full((like.numel() + shift,), torch.nan, dtype=dtype, device=like.device)
        return empty[shift:].view(like.shape)

    q, k, v = (place(t).copy_(t) for t in tensors)
    out, lse = place(q), place(q[..., 0], torch.float32)
    call = ThoughtDiagonal(q, k, v, *(text or (None, None)), sinks, out, lse, scale)
    diagonal_forward(call)
    dout = place(q).copy_(torch.randn_like(q))
    results = [place(q), place(k), place(v)]
    delta = place(q[..., 0], torch.float32)
    diagonal_backward(ThoughtDiagonalBackward(call, dout, None, *results, delta))
    return out, lse, dout, results, delta


#            B  Hq Hkv Sq Sk  M   D   unaligned by
DIAGONALS = [
    (1, 2, 1, 3, 3, 4, 64, 0),
    (2, 3, 1, 2, 9, 2, 32, 0),
    (1, 8, 2, 15, 15, 1, 128, 0),
    (1, 14, 2, 15, 15, 2, 120, 0),
    (2, 6, 2, 9, 16, 2, 56, 0),
    (1, 4, 1, 6, 6, 2, 256, 0),
    (1, 18, 1, 4, 17, 1, 8, 0),
    (1, 34, 1, 4, 35, 1, 136, 0),
    (1, 2, 2, 18, 20, 1, 256, 0),
    (1, 2, 2, 3, 3, 2, 64, 1),
    (1, 2, 1, 2, 3, 2, 37, 0),
    (1, 1, 1, 1, 1, 1, 1, 0),
    (1, 2, 1, 1, 0, 3, 16, 0),
    (0, 2, 1, 1, 1, 3, 16, 0),
    (1, 2, 1, 2, 2, 0, 16, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", DIAGONALS, ids=str)
def test_diagonal_kernel(cuda_place, dtype, shape):
    cuda_place.must_launch = shape[0] * shape[5] > 0
    within_budget(cuda_place.device, dtype, shape)


@pytest.mark.cuda_on_cpu
def test_kernels_of_a_graphics_card(cuda_on_cpu):
    """Where two blocks that lay all they read into shared memory do not fit, other kernels run."""
    cuda_on_cpu.set_shared_memory_limit(99 * 1024)
    within_budget("cpu", torch.bfloat16, (1, 8, 2, 15, 15, 1, 128, 0))


def within_budget(device, dtype, shape):
    b, hq, hkv, sq, sk, m, size, shift = shape
    if dtype == torch.float32:
        hq = min(hq, 4 * hkv)  # it has no tiles that more rows could fill
    made, start, stop, _ = make(b, hq, hkv, sq, sk, m, 0, size, dtype=dtype)
    made = [t.detach().to(device) for t in made]
    tensors = [made[0], made[3], made[4]]
    sinks = torch.randn(hq, device=device)
    out, lse, dout, results, delta = diagonal(tensors, 0.2, sinks, shift=shift)

    def run(dtype):
        exact = [t.to(dtype).requires_grad_() for t in made]
        result, logs = reference(*exact, start.to(device), stop.to(device), scale=0.2, sinks=sinks)
        wanted = torch.autograd.grad(result, [exact[0], exact[3], exact[4]], dout.to(result.dtype))
        return [result, *wanted], logs

    truth, true_lse = run(torch.float64)
    theirs, _ = run(dtype)
    budget(["out", "dq", "dk", "dv"], [out, *results], theirs, truth, dtype, roundings=3)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    true_delta = (dout.double() * out.double()).sum(-1)
    torch.testing.assert_close(delta.double(), true_delta, rtol=1e-4, atol=1e-4)


def kernel_of(cuda_on_cpu, skip, shape, slot_stride=0):
    """The name of the kernel that launch number ``skip`` of a call would be of."""
    b, hq, hkv, sq, sk, m, size = shape
    made, *_ = make(b, hq, hkv, sq, sk, m, 0, size, dtype=torch.bfloat16)
    q, k, v = (made[i].detach() for i in (0, 3, 4))
    if slot_stride:
        q = q.as_strided(q.shape, (*q.stride()[:2], slot_stride, *q.stride()[3:]))
    out, lse = torch.empty_like(made[0]), q.new_empty(q.shape[:-1], dtype=torch.float32)
    call = ThoughtDiagonal(q, k, v, None, None, None, out, lse, 0.2)
    cuda_on_cpu.fail_launch(skip)
    with pytest.raises(RuntimeError, match="injected launch failure") as failed:
        diagonal_forward(call)
        results = (torch.empty_like(t) for t in (out, k, v, lse))
        diagonal_backward(ThoughtDiagonalBackward(call, out, None, *results))
    return str(failed.value).partition(":")[0]


@pytest.mark.cuda_on_cpu
def test_which_kernel_runs(cuda_on_cpu):
    forward, backward = "thought_diagonal", "thought_diagonal_backward"
    paper = (1, 8, 2, 15, 15, 1, 128)
    for shape in (paper, (1, 2, 1, 16, 16, 2, 64), (1, 4, 4, 1, 3, 5, 8), (1, 56, 1, 1, 1, 1, 8)):
        assert kernel_of(cuda_on_cpu, 0, shape) == f"{forward} (staged)"
        assert kernel_of(cuda_on_cpu, 1, shape) == f"{backward} (staged)"
    for shape in ((1, 2, 1, 2, 17, 1, 64), (1, 2, 1, 3, 3, 1, 136), (1, 57, 1, 1, 1, 1, 8)):
        assert kernel_of(cuda_on_cpu, 0, shape) == forward
        assert kernel_of(cuda_on_cpu, 1, shape) == backward
    # More than 2^32 bytes from one row to the next.
    assert kernel_of(cuda_on_cpu, 0, (1, 4, 4, 1, 3, 5, 8), slot_stride=2**30) == forward
    # The stride of a single slot may be anything; those past it have an address as well.
    assert kernel_of(cuda_on_cpu, 0, (1, 4, 1, 1, 1, 2, 8), slot_stride=3) == forward
    assert kernel_of(cuda_on_cpu, 0, (1, 4, 1, 1, 1, 2, 8), slot_stride=24) == f"{forward} (staged)"
    cuda_on_cpu.set_shared_memory_limit(99 * 1024)
    assert kernel_of(cuda_on_cpu, 0, paper) == f"{forward} (staged)"
    assert kernel_of(cuda_on_cpu, 1, paper) == backward
    assert kernel_of(cuda_on_cpu, 1, (1, 8, 2, 15, 15, 1, 64)) == f"{backward} (staged)"


@pytest.mark.cuda_on_cpu
def test_rows_past_the_end_are_far(cuda_on_cpu):
    """Slots half a gigabyte apart: the place of a row that is not there is beyond 32 bits."""
    made, *_ = make(1, 2, 1, 2, 2, 1, 0, 64, dtype=torch.bfloat16)
    tensors = [made[i].detach() for i in (0, 3, 4)]
    near, _, dout, results, _ = diagonal(tensors, 0.2)
    apart = 2**28
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (apart + 128)), dtype=torch.bfloat16)  # pages of zeros
    far = memory.as_strided((1, 2, 2, 1, 64), (0, 64, apart, 0, 1)).copy_(tensors[0])
    out, lse = torch.empty_like(near), near.new_empty(near.shape[:-1], dtype=torch.float32)
    call = ThoughtDiagonal(far, *tensors[1:], None, None, None, out, lse, 0.2)
    diagonal_forward(call)
    found = [torch.empty_like(t) for t in (*results, lse)]
    diagonal_backward(ThoughtDiagonalBackward(call, dout, None, *found))
    cuda_on_cpu.fail_launch(0)
    with pytest.raises(RuntimeError, match=r"thought_diagonal \(staged\)"):
        diagonal_forward(call)
    assert torch.equal(out, near)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], results, strict=True))


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("slots", [16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_of_threads_changes_nothing(cuda_on_cpu, dtype, slots):
    made, *_ = make(1, 5, 1, 15, slots, 1, 0, 72, dtype=dtype)
    tensors = [made[0].detach(), made[3].detach(), made[4].detach()]
    found = []
    for order in ("forward", "reverse", "shuffled", "uneven"):
        cuda_on_cpu.set_order(order, 5)
        before = cuda_on_cpu.launches()
        torch.manual_seed(3)
        out, lse, _, results, delta = diagonal(tensors, 0.2)
        assert cuda_on_cpu.launches() - before == (2 if dtype == torch.bfloat16 else 3)
        found.append([out, lse, *results, delta])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_rows_without_anything(device):
    """No slots, no text and no sink: zeros, lse = -inf and no gradient; a text part alone: itself."""
    made, *_ = make(1, 2, 1, 1, 0, 5, 0, 16, dtype=torch.bfloat16)
    tensors = [made[i].detach().to(device) for i in (0, 3, 4)]
    out, lse, _, (dq, *_), delta = diagonal(tensors, 1.0)
    assert (out == 0).all() and (lse == -torch.inf).all() and (dq == 0).all() and (delta == 0).all()
    text = torch.randn_like(out), torch.randn_like(lse)
    out, lse, *_ = diagonal(tensors, 1.0, text=text)
    torch.testing.assert_close(out, text[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(lse, text[1], rtol=1e-5, atol=1e-5)
    nothing = torch.full_like(text[0], torch.nan), torch.full_like(text[1], -torch.inf)
    out, lse, *_ = diagonal(tensors, 1.0, text=nothing)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_sizes_are_checked(cuda_place):
    cuda_place.must_launch = False
    made, *_ = make(1, 2, 1, 1, 1, 1, 0, 264, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head size of 264"):
        diagonal([made[i].detach().to(cuda_place.device) for i in (0, 3, 4)], 1.0)

"""thought_attention against a dense mask, against stock flash attention, and against the reference.

Packed passes, the shapes of a training step: every text position thinks (M = N columns), 15 slots
(nine sampled tokens, two meta tokens, four talk tokens). B1 Hq8 Hkv4 N256 D32 is the small training
model; Hkv8 D64 has no grouped heads to share a key with; Hkv2 N512 D64 is long and shares most.

- ``dense mask``: scaled_dot_product_attention with the mask drawn, [S M] rows x [N + S M] keys, as
  the published algorithm has it.
- ``flash on the text prefix``: torch's own causal flash kernel for the text part of the slot rows
  alone. Slot s of all columns is one causal attention of N queries over N keys, S of them a batch,
  heads repeated beforehand. It leaves out the slots' own keys and the merge, so no construction from
  the stock kernel is faster than this.
- ``reference``: the same function with impl="reference".

Steps, one query slot: a rollout (all columns at once) against the dense mask and the flash kernel on
the text, and generation (one column) against plain attention over the same keys.

On a GPU, bf16: packed passes of N = 256, 1024 and 4096 columns, 15 slots, 32 heads of 128 on 8 key heads
(those of Mistral 7B and Llama 3 8B), against

- the stock kernels (flash, cuDNN) on the text prefix alone, as above; the best of them counts,
- compiled flex_attention with a block mask over [text, slots],
- the dense mask, up to N = 1024; beyond, it needs more memory than there is,

and the steps of a rollout and of generation. Keys and values are those of the packed layout.

GFLOP counted: 4 D per row and key seen in the forward pass, 10 D in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import DEVICE, ON_GPU, Table, compare, device, finished, record
from quietstar_ext import thought_attention

pytestmark = pytest.mark.device

#          B  Hq Hkv  N   S   D
PACKED = [(1, 8, 4, 256, 15, 32), (1, 8, 8, 256, 15, 64), (1, 8, 2, 512, 15, 64)]
#         B  Hq Hkv  N    M   Sk  D
STEPS = [(1, 8, 4, 256, 256, 5, 32), (1, 8, 2, 512, 512, 10, 64), (1, 32, 8, 2048, 1, 10, 128)]
#             B  Hq  Hkv N     S   D
GPU_PACKED = [(1, 32, 8, 256, 15, 128), (1, 32, 8, 1024, 15, 128), (1, 32, 8, 4096, 15, 128)]
#            B   Hq Hkv  N     M    Sk  D
GPU_STEPS = [(1, 32, 8, 1024, 1024, 8, 128), (1, 32, 8, 4096, 1, 10, 128), (64, 32, 8, 2048, 1, 10, 128)]
STOCK = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
MAX_DENSE = 1024
Contestants = dict[str, Callable[[], object]]


def inputs(b: int, hq: int, hkv: int, n: int, sq: int, sk: int, m: int, d: int) -> list[Tensor]:
    shapes = [(hq, sq, m), (hkv, n), (hkv, n), (hkv, sk, m), (hkv, sk, m)]
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    drawn = (torch.randn(b, *shape, d, device=DEVICE, dtype=dtype) for shape in shapes)
    return [t.requires_grad_() for t in drawn]


def ranges(b: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Columns at every position, or one at the end."""
    stop = torch.arange(n - m + 1, n + 1, dtype=torch.int32, device=DEVICE).expand(b, m).contiguous()
    return torch.zeros_like(stop), stop


def with_dense_mask(tensors: list[Tensor], stop: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Mask, keys and values over [text, slot 1, ..., slot S], made beforehand; heads repeated."""
    q, k_text, v_text, k_thought, v_thought = (t.detach() for t in tensors)
    (_, hq, sq, m, _), (n, sk) = q.shape, (k_text.shape[2], k_thought.shape[2])
    slots = torch.ones(sq, sk, dtype=torch.bool, device=DEVICE).tril(sk - sq)
    diagonals = slots[:, None, :, None] & torch.eye(m, dtype=torch.bool, device=DEVICE)[:, None]
    text = (torch.arange(n, device=DEVICE) < stop[0][:, None]).expand(sq, m, n)
    mask = torch.cat([text, diagonals.flatten(2)], -1).flatten(0, 1)
    group = hq // k_text.shape[1]
    rows = [
        q.flatten(2, 3),
        torch.cat([k_text, k_thought.flatten(2, 3)], 2).repeat_interleave(group, 1),
        torch.cat([v_text, v_thought.flatten(2, 3)], 2).repeat_interleave(group, 1),
    ]
    leaves = [t.contiguous().requires_grad_() for t in rows]
    return lambda: scaled_dot_product_attention(*leaves, attn_mask=mask), leaves


def flash_on_text(tensors: list[Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    q, k, v = (t.detach() for t in tensors[:3])
    (b, hq, s, n, d), hkv = q.shape, k.shape[1]
    rows = [q.transpose(1, 2).reshape(b * s, hq, n, d)]
    for t in (k, v):
        t = t.repeat_interleave(hq // hkv, 1)[:, None].expand(b, s, hq, n, d)
        rows.append(t.reshape(b * s, hq, n, d))
    leaves = [t.contiguous().requires_grad_() for t in rows]
    return lambda: scaled_dot_product_attention(*leaves, is_causal=True), leaves


def by_stock_backend(
    run: tuple[Callable[[], Tensor], list[Tensor]], backend: SDPBackend
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    forward, leaves = run

    def chosen() -> Tensor:
        with sdpa_kernel(backend):
            return forward()

    return chosen, leaves


def with_flex(tensors: list[Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """flex_attention over [text, slot 1, ..., slot S] for columns at every position, compiled; the
    block mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k_text, v_text, k_thought, v_thought = (t.detach() for t in tensors)
    (_, _, sq, m, _), (n, sk) = q.shape, (k_text.shape[2], k_thought.shape[2])

    def seen(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        slot, column = row // m, row % m
        other = key - n
        same = (other >= 0) & (other % m == column) & (other // m <= slot + sk - sq)
        return torch.where(key < n, key <= column, same)

    mask = create_block_mask(seen, None, None, sq * m, n + sk * m, device=DEVICE, _compile=True)
    rows = [
        q.flatten(2, 3),
        torch.cat([k_text, k_thought.flatten(2, 3)], 2),
        torch.cat([v_text, v_thought.flatten(2, 3)], 2),
    ]
    leaves = [t.contiguous().requires_grad_() for t in rows]
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*leaves, block_mask=mask, enable_gqa=True), leaves


def backward_of(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    out = forward()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def both(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, grad)


# What is timed of a contestant, and the operations per row, key seen and D.
PARTS: dict[str, tuple[Callable[..., Callable[[], object]], int]] = {
    "forward": (lambda forward, leaves: forward, 4),
    "backward": (backward_of, 10),
    "forward + backward": (both, 14),
}


def report(
    benchmark: Any, title: str, runs: Contestants, rounds: int, gflop: float | None = None
) -> Table:
    benchmark.pedantic(finished(next(iter(runs.values()))), rounds=rounds, warmup_rounds=1)
    # A backward pass runs on the stream of its forward pass, which no capture has seen.
    results = compare(runs, rounds, graph="backward" not in title)
    record("thought_attention", title, results, benchmark, gflop=gflop)
    return results


@pytest.mark.parametrize("part", ["forward", "backward"] if ON_GPU else list(PARTS))
@pytest.mark.parametrize("shape", GPU_PACKED if ON_GPU else PACKED, ids=str)
def bench_packed(benchmark: Any, shape: tuple[int, ...], part: str) -> None:
    b, hq, hkv, n, s, d = shape
    tensors = inputs(b, hq, hkv, n, s, s, n, d)
    start, stop = ranges(b, n, n)

    def ours(impl: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
        return lambda: thought_attention(*tensors, start, stop, impl=impl), tensors

    everyone = {"fused": ours("fused")}
    if ON_GPU:
        for name, backend in STOCK.items():
            everyone[f"{name} on the text prefix"] = by_stock_backend(flash_on_text(tensors), backend)
        everyone["flex_attention, block mask"] = other = with_flex(tensors)
        if n <= MAX_DENSE:
            everyone["dense mask"] = with_dense_mask(tensors, stop)
    else:
        everyone["flash on the text prefix"] = flash_on_text(tensors)
        other = with_dense_mask(tensors, stop)
        if part != "backward":
            everyone |= {"reference": ours("reference"), "dense mask": other}
    found, wanted = everyone["fused"][0]().flatten(2, 3), other[0]()
    atol, rtol = (3e-2, 3e-2) if ON_GPU else (1e-5, 1e-4)
    torch.testing.assert_close(found.float(), wanted.float(), atol=atol, rtol=rtol)
    make, operations = PARTS[part]
    runs: Contestants = {name: make(*each) for name, each in everyone.items()}
    gflop = operations * d * b * hq * s * n * ((n + 1) / 2 + (s + 1) / 2) / 1e9
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    title = f"thought_attention {part}, B{b} Hq{hq} Hkv{hkv} N{n} S{s} D{d} {dtype}"
    rounds = 15 if ON_GPU else 9 if part == "backward" else 5
    table = report(benchmark, title, runs, rounds, gflop)
    if ON_GPU:
        best = min(row["ms"] for name, row in table.items() if "prefix" in name)
        print(f"  {table['fused']['ms'] / best:.2f} times the best stock kernel on the prefix")
        if part == "forward":
            peak = device.peak_mb(everyone["fused"][0])
            print(f"  {peak:.0f} MB beyond the inputs, of which out is the most")


@pytest.mark.parametrize("shape", GPU_STEPS if ON_GPU else STEPS, ids=str)
def bench_step(benchmark: Any, shape: tuple[int, ...]) -> None:
    b, hq, hkv, n, m, sk, d = shape
    tensors = [t.detach() for t in inputs(b, hq, hkv, n, 1, sk, m, d)]
    start, stop = ranges(b, n, m)
    runs: Contestants = {
        "fused": lambda: thought_attention(*tensors, start, stop, impl="fused"),
        "dense mask": with_dense_mask(tensors, stop)[0],
    }
    if m == n:
        runs["flash on the text prefix"] = flash_on_text(tensors)[0]
    else:
        rows = tensors[0][:, :, 0]
        k, v = (torch.cat([tensors[i], tensors[i + 2].flatten(2, 3)], 2) for i in (1, 2))
        runs["plain attention"] = lambda: scaled_dot_product_attention(rows, k, v, enable_gqa=True)
    with torch.no_grad():
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        title = f"thought_attention step, B{b} Hq{hq} Hkv{hkv} N{n} M{m} Sk{sk} D{d} {dtype}"
        report(benchmark, title, runs, 15)

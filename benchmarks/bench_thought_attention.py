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

GFLOP counted: 4 D per row and key seen in the forward pass, 10 D in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import compare, show, write
from quietstar_ext import thought_attention

#          B  Hq Hkv  N   S   D
PACKED = [(1, 8, 4, 256, 15, 32), (1, 8, 8, 256, 15, 64), (1, 8, 2, 512, 15, 64)]
#         B  Hq Hkv  N    M   Sk  D
STEPS = [(1, 8, 4, 256, 256, 5, 32), (1, 8, 2, 512, 512, 10, 64), (1, 32, 8, 2048, 1, 10, 128)]
Contestants = dict[str, Callable[[], object]]
_tables: dict[str, Any] = {}


def inputs(b: int, hq: int, hkv: int, n: int, sq: int, sk: int, m: int, d: int) -> list[Tensor]:
    shapes = [(hq, sq, m), (hkv, n), (hkv, n), (hkv, sk, m), (hkv, sk, m)]
    return [torch.randn(b, *shape, d, requires_grad=True) for shape in shapes]


def ranges(b: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Columns at every position, or one at the end."""
    stop = torch.arange(n - m + 1, n + 1, dtype=torch.int32).expand(b, m).contiguous()
    return torch.zeros_like(stop), stop


def with_dense_mask(tensors: list[Tensor], stop: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Mask, keys and values over [text, slot 1, ..., slot S], made beforehand; heads repeated."""
    q, k_text, v_text, k_thought, v_thought = (t.detach() for t in tensors)
    (_, hq, sq, m, _), (n, sk) = q.shape, (k_text.shape[2], k_thought.shape[2])
    slots = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
    diagonals = slots[:, None, :, None] & torch.eye(m, dtype=torch.bool)[:, None]
    text = (torch.arange(n) < stop[0][:, None]).expand(sq, m, n)
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


def backward_of(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    out = forward()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def both(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, grad)


def report(
    benchmark: Any, title: str, runs: Contestants, rounds: int, gflop: float | None = None
) -> None:
    benchmark.pedantic(next(iter(runs.values())), rounds=rounds, warmup_rounds=1)
    results = compare(runs, rounds=rounds)
    benchmark.extra_info.update({name: row["times_ours"] for name, row in results.items()})
    show(title, results)
    if gflop is not None:
        best = next(iter(results.values()))["best_ms"]
        print(f"  {gflop:.2f} GFLOP, {gflop / best * 1e3:.0f} GFLOP/s at best")
    _tables[title] = results
    write("thought_attention", _tables)


@pytest.mark.parametrize("part", ["forward", "backward", "forward + backward"])
@pytest.mark.parametrize("shape", PACKED, ids=str)
def bench_packed(benchmark: Any, shape: tuple[int, ...], part: str) -> None:
    b, hq, hkv, n, s, d = shape
    tensors = inputs(b, hq, hkv, n, s, s, n, d)
    start, stop = ranges(b, n, n)

    def fused() -> Tensor:
        return thought_attention(*tensors, start, stop, impl="fused")

    def reference() -> Tensor:
        return thought_attention(*tensors, start, stop, impl="reference")

    flash, dense = flash_on_text(tensors), with_dense_mask(tensors, stop)
    torch.testing.assert_close(fused().flatten(2, 3), dense[0](), atol=1e-5, rtol=1e-4)
    everyone = {"fused": (fused, tensors), "flash on the text prefix": flash}
    if part != "backward":
        everyone |= {"reference": (reference, tensors), "dense mask": dense}
    make: Callable[..., Callable[[], object]] = {
        "forward": lambda forward, leaves: forward,
        "backward": backward_of,
        "forward + backward": both,
    }[part]
    runs: Contestants = {name: make(*each) for name, each in everyone.items()}
    keys = b * hq * s * n * ((n + 1) / 2 + (s + 1) / 2)
    times = {"forward": 4, "backward": 10, "forward + backward": 14}[part]
    title = f"thought_attention {part}, B{b} Hq{hq} Hkv{hkv} N{n} S{s} D{d} float32"
    report(benchmark, title, runs, 5 if part != "backward" else 9, keys * times * d / 1e9)


@pytest.mark.parametrize("shape", STEPS, ids=str)
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
        title = f"thought_attention step, B{b} Hq{hq} Hkv{hkv} N{n} M{m} Sk{sk} D{d} float32"
        report(benchmark, title, runs, 15)

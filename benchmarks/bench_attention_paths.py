"""thought_attention on a GPU: the fused kernel against stock flash attention plus the diagonal kernel.

Both serve a training step in which every position thinks; which of them takes it is decided by the
length of the text alone (``quietstar_ext.thought_attention.composed.takes_composed``), and the last
table says what this device would put into ``MEASURED`` there: the shortest text from which the
composed path is ahead, forward and backward together, at every longer length that was tried.

Shapes: the heads of Llama-3.2-1B (32 over 8, size 64), and of Mistral-7B and Llama-3.1-8B (size 128), 15
slots, bf16; one rationale and two, which a packed pass lays out for the path it takes: as neighbours for
the fused kernel, one behind the other (``rationale_major``) for the composed path. That one is timed
with either of torch's kernels. ``flash on the text`` and ``cuDNN on the text`` are the stock kernels'
part alone, as the composed path calls it; ``cuDNN on the text, contiguous`` is given tensors that it
need not copy: no path can be expected to be faster than the best of the three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import DEVICE, Table, compare, needs_gpu, record
from quietstar_ext import thought_attention
from quietstar_ext.thought_attention.stock import stock_backward, stock_forward, use_stock

pytestmark = pytest.mark.device

LENGTHS = (256, 512, 1024, 2048, 4096)


def inputs(length: int, rationales: int, heads: tuple[int, int], slots: int, size: int) -> list[Tensor]:
    """q, keys and values as a model leaves them, heads next to each other."""
    q_heads, kv_heads = heads
    columns = length * rationales

    def rows(count: int, *sizes: int) -> Tensor:
        made = torch.randn(1, *sizes, count, size, device=DEVICE).bfloat16()
        return made.movedim(-2, 1).requires_grad_()

    text = [rows(kv_heads, length) for _ in range(2)]
    thought = [rows(kv_heads, slots, columns) for _ in range(2)]
    return [rows(q_heads, slots, columns), *text, *thought]


def ranges(length: int, rationales: int, rationale_major: bool) -> tuple[Tensor, Tensor]:
    """text_start and text_stop of columns of every position."""
    column = torch.arange(length * rationales, dtype=torch.int32, device=DEVICE)[None]
    stop = (column % length if rationale_major else column // rationales) + 1
    return torch.zeros_like(stop), stop


def paths(
    length: int,
    rationales: int,
    heads: tuple[int, int] = (32, 8),
    slots: int = 15,
    size: int = 128,
    rounds: int = 15,
) -> dict[str, Table]:
    """Both paths and the stock kernel's part, forward and forward with backward."""
    leaves = inputs(length, rationales, heads, slots, size)
    dout = torch.randn_like(leaves[0])

    def forward(impl: str) -> Callable[[], Tensor]:
        rationale_major = impl == "composed" and rationales > 1
        seen = ranges(length, rationales, rationale_major)
        promises = {"every_position": True, "rationale_major": rationale_major}
        return lambda: thought_attention(*leaves, *seen, **promises, impl=impl)

    def both(impl: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(impl)(), leaves, dout)

    def with_stock(kernel: str, run: Callable[[], object]) -> Callable[[], object]:
        def chosen() -> object:
            with use_stock(kernel):
                return run()

        return chosen

    def stock_part(backward: bool, contiguous: bool = False) -> Callable[[], object]:
        q, k, v = (t.detach() for t in leaves[:3])
        k, v = (t[0].expand(slots * rationales, -1, -1, -1) for t in (k, v))
        rows, grads = (
            t[0].unflatten(2, (rationales, length)).movedim(0, 2).flatten(0, 1) for t in (q, dout)
        )
        if contiguous:
            k, v, rows, grads = (t.contiguous() for t in (k, v, rows, grads))

        def run() -> None:
            out, lse = stock_forward(rows, k, v, size**-0.5)
            if backward:
                stock_backward(grads, rows, k, v, out, lse, size**-0.5)

        return run

    def contestants(make: Callable[[str], Callable[[], object]], backward: bool) -> dict[str, Any]:
        return {
            "fused": make("fused"),
            "composed": make("composed"),
            "composed, cuDNN": with_stock("cudnn", make("composed")),
            "flash on the text": stock_part(backward),
            "cuDNN on the text": with_stock("cudnn", stock_part(backward)),
            "cuDNN on the text, contiguous": with_stock("cudnn", stock_part(backward, contiguous=True)),
        }

    with torch.no_grad():
        found = {"forward": compare(contestants(forward, False), rounds)}
    return found | {"forward + backward": compare(contestants(both, True), rounds)}


def border(tables: dict[int, Table], path: str = "composed") -> int | None:
    """The shortest length from which a composed path is ahead at it and all longer ones."""
    best = None
    for length in sorted(tables, reverse=True):
        if tables[length][path]["times_ours"] >= 1:
            break
        best = length
    return best


@needs_gpu
@pytest.mark.parametrize("rationales", [1, 2])
@pytest.mark.parametrize("size", [64, 128])
def bench_paths(size: int, rationales: int) -> None:
    """All lengths, and from which on the composed path should be taken."""
    steps: dict[int, Table] = {}
    for length in LENGTHS:
        for part, table in paths(length, rationales, size=size).items():
            shape = f"B1 Hq32 Hkv8 N{length} R{rationales} S15 D{size} bfloat16"
            record("attention_paths", f"thought_attention {part}, {shape}", table)
            if part != "forward":
                steps[length] = table
    for path in ("composed", "composed, cuDNN"):
        ahead = border(steps, path)
        print(f"  {path}: ahead from N = {ahead} on (heads of {size}, {rationales} rationales)")

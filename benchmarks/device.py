"""Timing on a CUDA device, and the ceilings that its kernels are held against.

- Every timed call starts with a cold L2: a large buffer is read before it (read and not written, or
  the call would pay for writing the buffer's lines back).
- The host is ahead of the device: what is short is captured in a CUDA graph and replayed, and the
  buffer is read often enough to cover what the host needs for one call.
- A contestant is a function, or a list of functions that do the same on different inputs; a list is
  timed as one piece and divided, which suits kernels of a few microseconds.
- Operands of the ceilings are random: matrix products are faster on zeros.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[[], object]
Contestant = Run | Sequence[Run]

#: Where benchmarks put their inputs.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

GRAPH_BELOW_MS = 1.0
MAX_ROUNDS = 200
# What one table may take, in ms of device time; rounds are added until it is used up.
TABLE_MS = 400.0


def finished(run: Run) -> Run:
    """The same call, waiting for the device: for timers that read the host's clock."""
    if not ON_GPU:
        return run

    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait


def compare(
    contestants: dict[str, Contestant], rounds: int = 15, *, graph: bool = True
) -> dict[str, dict[str, float]]:
    """Time every contestant in turn, at least ``rounds`` times; more where they are quick.

    ``graph=False``: never capture (for calls that must not be). Returns per name ``ms`` (the median),
    ``best_ms``, ``times_ours`` (the median over the rounds) and ``graph`` (1 where a captured graph was
    replayed, 0 where the calls were made one by one).
    """
    timed = {name: _Timed(contestant, graph) for name, contestant in contestants.items()}
    once = sum(each.about_ms for each in timed.values())
    rounds = max(rounds, min(MAX_ROUNDS, int(TABLE_MS / max(once, 1e-3))))
    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, each in timed.items():
            pairs[name].append(each.enqueue())
    torch.cuda.synchronize()
    ms = {name: [each.ms(*pair) for pair in pairs[name]] for name, each in timed.items()}
    ours = next(iter(ms.values()))
    return {
        name: {
            "ms": statistics.median(mine),
            "best_ms": min(mine),
            "times_ours": statistics.median(a / b for a, b in zip(mine, ours, strict=True)),
            "graph": float(timed[name].captured),
        }
        for name, mine in ms.items()
    }


def median_ms(run: Contestant, rounds: int = 15, *, graph: bool = True) -> float:
    """The median time of one call in milliseconds."""
    return compare({"": run}, rounds, graph=graph)[""]["ms"]


def peak_mb(run: Run) -> float:
    """The peak of memory that a call holds beyond what is there before it, in MB (10^6 bytes)."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@functools.cache
def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read and written, GB/s) and matrix product rates (GFLOP/s), measured once
    per process."""
    source = torch.rand(1 << 30, device=DEVICE)
    target = torch.empty_like(source)
    # The best of three: a copy in a graph, the copy engine and a kernel do not take the same time.
    copies = (
        median_ms(functools.partial(target.copy_, source)),
        median_ms(functools.partial(target.copy_, source), graph=False),
        median_ms(functools.partial(torch.neg, source, out=target), graph=False),
    )
    found = {"copy_gb_per_s": 2 * source.nbytes / min(copies) / 1e6}
    del source, target
    for name, dtype, size in (
        ("bfloat16", torch.bfloat16, 8192),
        ("tf32", torch.float32, 8192),
        ("float32", torch.float32, 4096),
    ):
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = functools.partial(torch.mm, a, b, out=out)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        try:
            found[f"matmul_{name}_gflop_per_s"] = 2e-6 * size**3 / median_ms(product)
        finally:
            torch.set_float32_matmul_precision(before)
    return {name: round(value, 1) for name, value in found.items()}


def rates(row: dict[str, float], megabytes: float | None = None, gflop: float | None = None) -> str:
    """What a contestant moves or computes per second, put into its row and returned as a line.

    ``megabytes`` (10^6 bytes) is what it has to read and write; ``of_copy`` is its bandwidth over that
    of a copy, measured in this process.
    """
    parts = []
    if megabytes is not None:
        row["gb_per_s"] = megabytes / row["ms"]
        row["of_copy"] = row["gb_per_s"] / ceilings()["copy_gb_per_s"]
        parts.append(f"{megabytes:.1f} MB, {row['gb_per_s']:.0f} GB/s, {row['of_copy']:.1%} of a copy")
    if gflop is not None:
        row["gflop_per_s"] = gflop / row["ms"] * 1e3
        parts.append(f"{gflop:.1f} GFLOP, {row['gflop_per_s'] / 1e3:.1f} TFLOP/s")
    return "  " + "; ".join(parts)


class _Timed:
    """One contestant: warmed up, captured where that pays, and timed with events."""

    def __init__(self, contestant: Contestant, graph: bool) -> None:
        self._runs = [contestant] if callable(contestant) else list(contestant)
        self._flushes = 1
        self._call: Run = self._each
        self._graph: Any = None
        stream = torch.cuda.Stream()  # a capture wants its warm-up on a stream beside the main one
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._each()
        torch.cuda.current_stream().wait_stream(stream)
        host_ms = self._host_ms()
        self.about_ms = self._about_ms()
        if graph and self.about_ms < GRAPH_BELOW_MS * len(self._runs) and self._capture():
            host_ms = self._host_ms()
            self.about_ms = self._about_ms()
        self._flushes = max(1, min(50, round(1.5 * host_ms / _flush_ms() + 0.5)))
        self.about_ms += self._flushes * _flush_ms()

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def enqueue(self) -> tuple[Any, Any]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush(self._flushes)
        begin.record()
        self._call()
        end.record()
        return begin, end

    def ms(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / len(self._runs)

    def _each(self) -> None:
        for run in self._runs:
            run()

    def _capture(self) -> bool:
        """Whether the calls could be captured; what they do, as a graph."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                self._each()
        except RuntimeError as error:  # a call that waits for the device, for one
            torch.cuda.synchronize()
            print(f"  (not captured: {str(error).splitlines()[0][:120]})")
            return False
        self._graph, self._call = graph, graph.replay
        graph.replay()
        return True

    def _host_ms(self) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self._call()
        host = (time.perf_counter() - begin) * 1e3
        torch.cuda.synchronize()
        return host

    def _about_ms(self) -> float:
        pairs = [self.enqueue() for _ in range(3)]
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


@functools.cache
def _flush_buffers() -> tuple[torch.Tensor, torch.Tensor]:
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    buffer = torch.ones(max(256 << 20, 4 * cache) // 4, device=DEVICE)
    return buffer, torch.empty((), device=DEVICE)


def _flush(times: int = 1) -> None:
    buffer, total = _flush_buffers()
    for _ in range(times):
        torch.sum(buffer, 0, out=total)


@functools.cache
def _flush_ms() -> float:
    _flush(3)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    _flush(10)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 10

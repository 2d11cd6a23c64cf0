"""benchmarks/device.py with a pretended device, whose work is done when it is asked for."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "device.py"


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    """Replays what ran inside ``capture``."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            call()


@contextmanager
def capture(graph: Graph) -> Iterator[None]:
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


@pytest.fixture
def device(monkeypatch) -> ModuleType:
    fakes: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": lambda stream: nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda: None,
        "get_device_properties": lambda which: SimpleNamespace(L2_cache_size=1 << 10),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    spec = importlib.util.spec_from_file_location("benchmark_device", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_flush_buffers", lambda: (torch.ones(64), torch.empty(())))
    monkeypatch.setattr(module, "_flush_ms", lambda: 0.05)
    return module


def busy(ms: float, can_be_captured: bool = True) -> Callable[[], None]:
    def work() -> None:
        end = time.perf_counter() + ms / 1e3
        while time.perf_counter() < end:
            pass

    def run() -> None:
        if Graph.capturing is None:
            work()
        elif can_be_captured:
            Graph.capturing.calls.append(work)
        else:
            raise RuntimeError("operation not permitted when stream is capturing")

    return run


def test_compare_times_each_and_captures_what_is_short(device, capsys):
    device.GRAPH_BELOW_MS = 20  # far from either, on a busy machine
    pieces = [busy(0.2) for _ in range(3)]
    results = device.compare(
        {
            "ours": busy(0.2),
            "long": busy(40.0),
            "three inputs": pieces,
            "waits for the device": busy(0.4, can_be_captured=False),
        },
        rounds=5,
    )
    captured = {name: row["graph"] for name, row in results.items()}
    assert captured == {"ours": 1, "long": 0, "three inputs": 1, "waits for the device": 0}
    assert "not captured: operation not permitted" in capsys.readouterr().out
    for name, wanted in (
        ("ours", 0.2),
        ("long", 40),
        ("three inputs", 0.2),
        ("waits for the device", 0.4),
    ):
        assert wanted <= results[name]["best_ms"] <= results[name]["ms"]
    assert results["ours"]["times_ours"] == 1
    assert results["long"]["times_ours"] > 2  # 200, on a machine that does nothing else
    assert device.compare({"ours": busy(0.2)}, graph=False)["ours"]["graph"] == 0


def test_rates_are_of_the_ceiling(device, monkeypatch):
    monkeypatch.setattr(device, "ceilings", lambda: {"copy_gb_per_s": 4000.0})
    row = {"ms": 0.5}
    line = device.rates(row, megabytes=1000, gflop=50)
    assert row == {"ms": 0.5, "gb_per_s": 2000, "of_copy": 0.5, "gflop_per_s": 100_000}
    assert "50.0% of a copy" in line and "100.0 TFLOP/s" in line


def test_ceilings_are_named_as_the_report_reads_them(device, monkeypatch):
    # A graph of the copy and the copy itself are no ceilings where a kernel is faster.
    monkeypatch.setattr(
        device,
        "median_ms",
        lambda run, graph=True: 2.0 if "neg" in repr(run) or "mm" in repr(run) else 3.0,
    )
    real = torch.rand, torch.randn
    monkeypatch.setattr(torch, "rand", lambda n, **kw: real[0](n >> 16, **kw))
    monkeypatch.setattr(torch, "randn", lambda *size, **kw: real[1](2, 2, **kw))
    before = torch.get_float32_matmul_precision()
    found = device.ceilings()
    assert torch.get_float32_matmul_precision() == before
    assert found["copy_gb_per_s"] == pytest.approx(2 * 4 * 16384 / 2 / 1e6, abs=0.1)
    for name, size in (("bfloat16", 8192), ("tf32", 8192), ("float32", 4096)):
        assert found[f"matmul_{name}_gflop_per_s"] == pytest.approx(1e-6 * size**3, rel=1e-6)


def test_finished_is_the_call_itself_without_a_device(device):
    calls = []
    device.finished(lambda: calls.append(1))()
    assert calls == [1]

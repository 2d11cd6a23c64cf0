"""What the benchmarks share: interleaved timing, and the result files that the README's tables show.

Run with ``pytest benchmarks``. Contestants are timed in turn, round after round, so that a busy machine
slows all of them alike; the ratio is the median over the rounds.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import quietstar_ext

RESULTS = Path(__file__).parent / "results"


def compare(
    contestants: dict[str, Callable[[], object]], rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Time every contestant ``rounds`` times in turn.

    Returns per name ``ms`` (the median), ``best_ms``, and ``times_ours``: how many times as long as
    the first contestant it took, the median over the rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    ours = next(iter(seconds.values()))
    return {
        name: {
            "ms": statistics.median(mine) * 1e3,
            "best_ms": min(mine) * 1e3,
            "times_ours": statistics.median(a / b for a, b in zip(mine, ours, strict=True)),
        }
        for name, mine in seconds.items()
    }


def show(title: str, results: dict[str, dict[str, float]], megabytes: float | None = None) -> None:
    """Print a table; megabytes is what the first contestant has to read and write."""
    print(f"\n{title}")
    for name, row in results.items():
        print(f"  {name:32} {row['ms']:9.2f} ms   {row['times_ours']:7.2f} x")
    if megabytes is not None:
        best = next(iter(results.values()))["best_ms"]
        print(f"  {megabytes:.1f} MB, {megabytes / best:.1f} GB/s at best")


def write(stem: str, tables: dict[str, Any]) -> None:
    """Write tables to results/<stem>.json, with the machine they come from."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "simd": quietstar_ext.build_info().get("simd"),
    }
    path = RESULTS / f"{stem}.json"
    path.write_text(json.dumps({"machine": machine, **tables}, indent=1) + "\n")

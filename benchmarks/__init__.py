"""What the benchmarks share: interleaved timing, and the result files that the README's tables show.

Run with ``pytest benchmarks``. Contestants are timed in turn, round after round, so that a busy machine
slows all of them alike; the ratio is the median over the rounds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import quietstar_ext
from benchmarks import device
from benchmarks.device import DEVICE, ON_GPU, finished

__all__ = ["DEVICE", "ON_GPU", "RESULTS", "compare", "finished", "listening", "needs_gpu", "record"]

RESULTS = Path(__file__).parent / "results"
Table = dict[str, dict[str, float]]
# What this process has measured, by benchmark: the file holds one set of tables for each.
_tables: dict[str, dict[str, Table]] = defaultdict(dict)

# What a person has written into a file about its machine.
KEPT_FACTS = ("notes", "not_measured")

# The method's settings in the paper (the constants of REINFORCE do not change the work).
PAPER = {"thought_length": 9, "talk_length": 4, "num_rationales": 2}

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")


def listening(decoder: PreTrainedModel, std: float = 0.2, **thoughts: Any) -> Any:
    """A model of a decoder, the last two tokens of the vocabulary as meta tokens, with a head that
    listens: an untrained one gives no reward, and rows without a reward would be skipped."""
    from quietstar import QuietStarForCausalLM

    last = decoder.config.vocab_size - 1
    model = QuietStarForCausalLM.from_base(
        decoder, start_token_id=last - 1, end_token_id=last, **thoughts
    )
    with torch.no_grad():
        model.mixing_head.fc3.weight.normal_(0, std)
    return model


def compare(
    contestants: dict[str, Callable[[], object]],
    rounds: int = 15,
    *,
    on_host: bool = not ON_GPU,
    graph: bool = True,
) -> Table:
    """Time every contestant ``rounds`` times in turn; on a CUDA device by :mod:`benchmarks.device`,
    unless ``on_host`` says that the contestants do not use it. ``graph=False``: calls that must not be
    captured in a CUDA graph.

    Returns per name ``ms`` (the median), ``best_ms``, and ``times_ours``: how many times as long as
    the first contestant it took, the median over the rounds.
    """
    if not on_host:
        return device.compare(dict(contestants), rounds, graph=graph)
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


def record(
    stem: str,
    title: str,
    results: Table,
    benchmark: Any = None,
    megabytes: float | None = None,
    gflop: float | None = None,
) -> None:
    """Print a table and put it into results/<machine>.json, beside those of the other benchmarks.

    Args:
        benchmark: pytest-benchmark's fixture, which gets the ratios.
        megabytes, gflop: what the first contestant has to read and write, and to compute. On a CUDA
            device its rates go into its row, too.
    """
    _show(title, results, megabytes, gflop)
    if benchmark is not None:
        benchmark.extra_info.update({name: row["times_ours"] for name, row in results.items()})
    _tables[stem][title] = results
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine_name()}.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    before = content.get("machine", {})
    # What is missing is known to whoever reads the figures, and is kept until they say otherwise.
    kept = {name: before[name] for name in KEPT_FACTS if name in before}
    now = machine()
    content["machine"] = {**now, **kept}
    tables = dict(_tables[stem])
    if ON_GPU:
        # A call may be cut off: what it did not come to stays, and each row names the sources it timed.
        if "commit" in now:
            tables[title] = {name: {**row, "commit": now["commit"]} for name, row in results.items()}
            _tables[stem][title] = tables[title]
        old = content.get("benchmarks", {}).get(stem, {}).get("tables", {})
        tables = {**old, **tables}
        content["machine"] |= _span(before, now)
    measured: dict[str, Any] = {"date": date.today().isoformat(), "tables": tables}
    if os.getloadavg()[0] > 1 + (os.cpu_count() or 1):
        measured["busy"] = True  # times are then longer than the machine's ceilings let expect
    content.setdefault("benchmarks", {})[stem] = measured
    path.write_text(json.dumps(content, indent=1) + "\n")


def _span(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What a file says of facts in which its rows differ."""
    first = str(before.get("commit", "")).split(" to ")[0]
    if not first or now.get("commit") in (None, first):
        return {}
    return {"commit": f"{first} to {now['commit']}"}


def _show(title: str, results: Table, megabytes: float | None, gflop: float | None) -> None:
    print(f"\n{title}")
    for name, row in results.items():
        print(f"  {name:32} {row['ms']:9.{2 if row['ms'] > 1 else 4}f} ms   {row['times_ours']:7.2f} x")
    if ON_GPU:
        if megabytes is not None or gflop is not None:
            print(device.rates(next(iter(results.values())), megabytes, gflop))
        return
    best = next(iter(results.values()))["best_ms"]
    if gflop is not None:
        print(f"  {gflop:.2f} GFLOP, {gflop / best * 1e3:.0f} GFLOP/s at best")
    if megabytes is not None:
        print(f"  {megabytes:.1f} MB, {megabytes / best:.1f} GB/s at best")


def machine_name() -> str:
    """A file name for this machine: its GPU's, or its processor's with the threads in use."""
    if torch.cuda.is_available():
        return _slug(torch.cuda.get_device_name())
    return f"{_slug(processor())}-{torch.get_num_threads()}-threads"


def _slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


# Some virtual machines call every generation of a maker's processors the same.
_ALL_ALIKE = "AMD EPYC"


def processor() -> str:
    """The processor's own name, where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    facts = dict(re.findall(r"^(.*?)[ \t]*:[ \t]*(.*?)[ \t]*$", text.partition("\n\n")[0], flags=re.M))
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({_generation(facts)})" if name == _ALL_ALIKE else name


def _generation(facts: dict[str, str]) -> str:
    """Of an AMD processor, by what /proc/cpuinfo says of it."""
    family, model = facts.get("cpu family", "?"), facts.get("model", "?")
    if family == "26":
        return "Zen 5"
    if family == "25":
        return "Zen 4" if "avx512_bf16" in facts.get("flags", "") else "Zen 3"
    return f"family {family}, model {model}"


def machine() -> dict[str, Any]:
    """What the figures were measured on, with the ceilings measured beside them."""
    return {**machine_facts(), **ceilings()}


def machine_facts() -> dict[str, Any]:
    """What results that are no times were found on."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "simd": quietstar_ext.build_info().get("simd"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["cuda_archs"] = quietstar_ext.build_info().get("cuda_archs")
        facts["transformers"] = transformers.__version__
        facts |= {"driver": driver(), "commit": commit(), "date": date.today().isoformat()}
    return {name: value for name, value in facts.items() if value is not None}


def driver() -> str | None:
    """Of the first GPU, as nvidia-smi says it."""
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str | None:
    """Of the sources here, where they are under git."""
    return _said("git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD")


def _said(*command: str) -> str | None:
    """The first line that a program writes; None where it fails or is not there."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].strip() if lines else None


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read and written, GB/s) and matrix product rates (GFLOP/s), measured."""
    if ON_GPU:
        return device.ceilings()
    source = torch.rand(32 << 20)
    target = torch.empty_like(source)
    size = 2048
    found = {"copy_gb_per_s": 2 * source.nbytes / _best(lambda: target.copy_(source)) / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
        name = f"matmul_{str(dtype).removeprefix('torch.')}_gflop_per_s"
        found[name] = 2 * size**3 / _best(lambda a=a, b=b: a @ b) / 1e9  # type: ignore[misc]
    return {name: round(value, 1) for name, value in found.items()}


def _best(run: Callable[[], object], rounds: int = 5) -> float:
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)

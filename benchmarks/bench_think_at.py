"""What thinking at fewer positions saves: a step with ``think_at`` all, stride, random, entropy.

The model and the text are those of ``bench_step``. Slots are nearly all of a step's columns (28 for
each token of text here), so a step should cost what the share of positions that think says, besides the
text pass and, for the entropy rule, one vocabulary product over the text. The operations of a step are
counted as well (matrix products, on the reference operators, where PyTorch can see them): they do not
depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, record
from benchmarks.bench_step import build
from quietstar import QuietStarForCausalLM
from quietstar_ext import use_impl

# Rule and the share of positions that think.
RULES = {
    "all": 1.0,
    "stride:2": 0.5,
    "stride:4": 0.25,
    "random:0.5": 0.5,
    "random:0.25": 0.25,
    "random:0.1": 0.1,
    "entropy:0.5": 0.5,
    "entropy:0.25": 0.25,
    "entropy:0.1": 0.1,
}


def contestants(model: QuietStarForCausalLM, ids: torch.Tensor) -> dict[str, Callable[[], None]]:
    """A step with each rule, and one without thoughts."""

    def step(rule: str | None) -> Callable[[], None]:
        def run() -> None:
            model.config.thought_kind = "none" if rule is None else "sampled"
            model.config.think_at = rule or "all"
            model.zero_grad()
            model(ids, labels=ids).loss.backward()

        return run

    return {**{rule: step(rule) for rule in RULES}, "no thoughts": step(None)}


def count_operations(run: Callable[[], None]) -> int:
    """Of one call, on the reference operators."""
    with use_impl("reference"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def bench_think_at(benchmark) -> None:  # type: ignore[no-untyped-def]
    """Time and operations of a step by rule, as shares of thinking everywhere."""
    model, ids = build()
    runs = contestants(model, ids)
    operations = {name: count_operations(run) for name, run in runs.items()}
    table = compare(runs, rounds=5, on_host=True)
    for name, row in table.items():
        row["operations_share"] = operations[name] / operations["all"]
    record("think_at", "think_at all, 7.9 M parameters", table)
    for name, row in table.items():
        shares = f"{RULES.get(name, 0.0):6.2f} of the positions, {row['operations_share']:6.3f}"
        print(f"  {name:32} {shares} of the operations")
    benchmark.pedantic(runs["random:0.25"], rounds=2)

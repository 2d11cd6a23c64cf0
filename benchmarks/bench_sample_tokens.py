"""sample_tokens against what PyTorch offers for the same draw.

512 rows x 32000 columns: one rollout step of a batch with a Llama-2-sized vocabulary.
64 x 152064: a Qwen-sized one, whose rows do not fit in a 512 KB cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import compare, show, write
from quietstar_ext import sample_tokens

SHAPES = [(512, 32_000), (64, 152_064)]
TRUNCATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "greedy": {"temperature": 0.0},
}
_tables: dict[str, Any] = {}


def contestants(logits: Tensor, options: dict[str, Any]) -> dict[str, Callable[[], object]]:
    def gumbel() -> Tensor:
        return torch.nn.functional.gumbel_softmax(logits, hard=True).argmax(-1)

    def multinomial() -> Tensor:
        return torch.multinomial(logits.softmax(-1), 1)

    return {
        "sample_tokens": lambda: sample_tokens(logits, seed=1, impl="fused", **options),
        "log_softmax": lambda: logits.log_softmax(-1),
        "softmax + multinomial": multinomial,
        "gumbel_softmax(hard=True)": gumbel,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRUNCATIONS)
def bench_sample_tokens(benchmark: Any, name: str, shape: tuple[int, int]) -> None:
    logits = torch.randn(shape) * 2
    runs = contestants(logits, TRUNCATIONS[name])
    benchmark(runs["sample_tokens"])
    if name != "plain":  # the others do not truncate: compared once, with the cheapest
        runs = {key: runs[key] for key in ("sample_tokens", "log_softmax")}
    results = compare(runs, rounds=9)
    benchmark.extra_info.update({key: row["times_ours"] for key, row in results.items()})
    title = f"sample_tokens, {shape[0]} x {shape[1]} float32, {name}"
    show(title, results, logits.nbytes / 1e6)
    _tables[title] = results
    write("sample_tokens", _tables)

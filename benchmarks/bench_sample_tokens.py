"""sample_tokens against what PyTorch offers for the same draw.

On a CPU
- 512 x 32000: one rollout step of a batch with a Llama-2-sized vocabulary.
- 64 x 152064: a Qwen-sized one, whose rows do not fit in a 512 KB cache.
On a GPU
- 4096 x 32000 and 2048 x 128256, the vocabularies of Mistral 7B and Llama 3: rollout steps, many rows.
- 64 x 128256, 64 x 32000 and 1 x 128256: generation, few rows. Whether one of them has to be added up
  again, which the call waits for, is a matter of the logits and the seed (docs/gpu_paths.md).
The bytes counted are one read of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import DEVICE, ON_GPU, compare, finished, record
from quietstar_ext import sample_tokens

pytestmark = pytest.mark.device

SHAPES = (
    [(4096, 32_000), (2048, 128_256), (64, 128_256), (64, 32_000), (1, 128_256)]
    if ON_GPU
    else [(512, 32_000), (64, 152_064)]
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32} if ON_GPU else {"float32": torch.float32}
TRUNCATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "banned": {"banned": [1, 2]},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "greedy": {"temperature": 0.0},
}


def contestants(logits: Tensor, options: dict[str, Any]) -> dict[str, Callable[[], object]]:
    seed = torch.ones(1, dtype=torch.int64, device=logits.device)
    if "banned" in options:
        options = {"banned": torch.tensor(options["banned"], device=logits.device)}

    def gumbel(logits: Tensor) -> Tensor:
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        return (logits.float() - noise.log()).argmax(-1)

    def multinomial() -> Tensor:
        return torch.multinomial(logits.softmax(-1, dtype=torch.float32), 1)

    found: dict[str, Callable[[], object]] = {
        "sample_tokens": lambda: sample_tokens(logits, seed=seed, impl="fused", **options),
        "log_softmax": lambda: logits.log_softmax(-1),
        "argmax": lambda: logits.argmax(-1),
        "softmax + multinomial": multinomial,
        "gumbel_softmax(hard=True)": lambda: torch.nn.functional.gumbel_softmax(
            logits, hard=True
        ).argmax(-1),
    }
    if ON_GPU:
        compiled = torch.compile(gumbel)
        found["torch.compile of Gumbel argmax"] = lambda: compiled(logits)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRUNCATIONS)
def bench_sample_tokens(benchmark: Any, name: str, shape: tuple[int, int], dtype: str) -> None:
    logits = (torch.randn(shape, device=DEVICE) * 2).to(DTYPES[dtype])
    runs = contestants(logits, TRUNCATIONS[name])
    benchmark(finished(runs["sample_tokens"]))
    if name != "plain":  # the others do not truncate: compared once, with the cheapest
        runs = {key: runs[key] for key in ("sample_tokens", "log_softmax")}
    results = compare(runs, rounds=9)
    title = f"sample_tokens, {shape[0]} x {shape[1]} {dtype}, {name}"
    record("sample_tokens", title, results, benchmark, megabytes=logits.nbytes / 1e6)

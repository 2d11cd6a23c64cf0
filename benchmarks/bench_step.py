"""One whole training step, forward and backward, against the algorithm as published.

The shape is that of a model that a person with two cores would train: 7.9 M parameters, hidden 256, 4
layers, 8 heads over 4, inner size 896, vocabulary 8194; 256 tokens, 9 thought tokens, 4 talk tokens, 2
rationales (the paper's n_ahead 12, 4 ahead, 2 passes). All in fp32, but for ``bf16 autocast``.
Contestants run in one process, in turn; memory is measured in a process of its own for each, as the
growth of the peak resident size over the model's.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import PAPER, compare, listening, record
from benchmarks.sequential import sequential_step
from quietstar import QuietStarForCausalLM
from quietstar_ext import use_impl

LENGTH = 256


def build() -> tuple[QuietStarForCausalLM, torch.Tensor]:
    """The model with the paper's settings (REINFORCE constants do not change the work)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8194,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    model = listening(LlamaForCausalLM(config), **PAPER).train()
    return model, torch.randint(0, 8192, (1, LENGTH))


def contestants(model: QuietStarForCausalLM, ids: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """A step of each kind; gradients are left in the model."""

    def ours() -> torch.Tensor:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def in_bf16() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours()

    def with_checkpointing(settings: dict[str, str] | None = None) -> torch.Tensor:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        try:
            return ours()
        finally:
            model.gradient_checkpointing_disable()

    def packed_with_references() -> torch.Tensor:
        with use_impl("reference"):
            return ours()

    def sequential() -> torch.Tensor:
        model.zero_grad()
        loss = sequential_step(model, ids)
        loss.backward()
        return loss.detach()

    return {
        "quietstar": ours,
        "quietstar, bf16 autocast": in_bf16,
        "quietstar, gradient checkpointing": with_checkpointing,
        "quietstar, checkpointing, products kept": partial(with_checkpointing, {"keep": "products"}),
        "packed, reference operators": packed_with_references,
        "sequential, dense (as published)": sequential,
    }


def peak_megabytes(name: str) -> float:
    """Growth of the peak resident size over two steps, in a process of its own."""
    code = f"from benchmarks.bench_step import _measure; _measure({name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def _measure(name: str) -> None:
    model, ids = build()
    run = contestants(model, ids)[name]
    model(ids[:, :8], labels=ids[:, :8]).loss.backward()  # gradients and libraries are there
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run()
    run()
    print(json.dumps((_status("VmHWM") - before) / 1024))


def _status(name: str) -> int:
    """A line of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def bench_training_step(benchmark) -> None:  # type: ignore[no-untyped-def]
    """Time and memory of one step."""
    model, ids = build()
    runs = contestants(model, ids)
    table = compare(runs, rounds=5, on_host=True)
    for name, row in table.items():
        row["peak_mb"] = peak_megabytes(name)
    record("step", "training step, 7.9 M parameters", table)
    for name, row in table.items():
        print(f"  {name:32} {row['peak_mb']:9.0f} MB over the model's")
    benchmark.pedantic(runs["quietstar"], rounds=2)

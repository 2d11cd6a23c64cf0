"""A whole training step of large decoders on a GPU.

Mistral-7B and Llama-3.2-1B, randomly initialised from the shapes below (nothing is downloaded), all in
bf16 as the paper's code: weights, gradients and AdamW's states. The paper's settings: n_ahead 12 (9
thought tokens), 4 ahead, 2 rationales, 256 tokens of text. A step is forward, backward, AdamW and
dropping the gradients; memory is the most that was allocated, everything included. Utilisation is
``benchmarks.flops`` (what the algorithm needs) over the time and the measured rate of a bf16 product.

``pytest benchmarks/bench_gpu_step.py -s`` on a machine with a GPU; without one they skip, and
tests/benchmarks/test_benchmark_step.py runs the same functions with a tiny decoder. What a slot and a
generated token take is in bench_gpu_generation.py.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from benchmarks import DEVICE, ON_GPU, PAPER, Table, compare, device, listening, needs_gpu, record
from benchmarks.flops import training_step_flops
from benchmarks.sequential import sequential_step
from quietstar import QuietStarForCausalLM
from quietstar.plan.costs import decoder_sizes
from quietstar.thinking.batch_share import WHOLE_BATCH
from quietstar.thinking.cuda_graphs import use_graphs

pytestmark = pytest.mark.device

# Two ids more than the models have: the meta tokens.
SHAPES: dict[str, Callable[[], Any]] = {
    "Mistral-7B": lambda: MistralConfig(
        vocab_size=32002,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        sliding_window=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "Llama-3.2-1B": lambda: LlamaConfig(
        vocab_size=128258,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=66,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    ),
}


def build(name: str) -> QuietStarForCausalLM:
    """The model on the device in bf16, with the paper's settings and a head that listens."""
    torch.manual_seed(0)
    with DEVICE:
        decoder = AutoModelForCausalLM.from_config(SHAPES[name](), dtype=torch.bfloat16)
    model: QuietStarForCausalLM = listening(decoder, **PAPER)
    return model.to(DEVICE, torch.bfloat16)


class Way(NamedTuple):
    """How our step is run; the first of :data:`WAYS` is how a recipe runs it on a GPU."""

    fused_layers: str = "auto"
    reuse_rollout: bool = False
    graphs: str = "auto"
    checkpointing: dict[str, str] | None = None
    texts: int | None = None  # through the packed pass at a time


# What was not measured yet comes first.
WAYS = {
    "quietstar": Way(),
    "quietstar, outputs of the rollout reused": Way(reuse_rollout=True),
    "quietstar, a text per backward pass": Way(texts=1),
    "quietstar, checkpointing, products kept": Way("off", checkpointing={"keep": "products"}),
    "quietstar, gradient checkpointing": Way(checkpointing={}),
    "quietstar, layers as they are": Way("off"),
    "quietstar, layers as they are, no graph": Way("off", graphs="off"),
}


@contextlib.contextmanager
def run_as(model: QuietStarForCausalLM, way: Way) -> Iterator[None]:
    """The model in this way, and as it was afterwards."""
    model.fuse_layers(way.fused_layers)
    model.reuse_rollout(way.reuse_rollout)
    if way.checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=way.checkpointing or None)
    try:
        with use_graphs(way.graphs):
            yield
    finally:
        model.gradient_checkpointing_disable()
        model.reuse_rollout(False)
        model.fuse_layers("off")


def training_step(
    name: str,
    batch: int,
    length: int,
    rounds: int = 5,
    measured: Callable[[Table], None] = lambda table: None,
) -> Table:
    """Time, memory and utilisation of our step in several ways, and of the published algorithm.

    One after the other, each timed ``rounds`` times when it is warm: what one has captured and compiled
    is gone when the next begins. What runs out of memory is left out of the table, and said so.

    Args:
        measured: is given the table after each row, so that a run that is cut off keeps the others.
    """
    model = build(name).train()
    ids = torch.randint(0, SHAPES[name]().vocab_size - 2, (batch, length), device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=ON_GPU)
    rewarded = []

    def whole() -> None:
        output = model(ids, labels=ids)
        rewarded.append((output.advantage.detach() > 0).float().mean())
        output.loss.backward()

    def in_parts(texts: int) -> None:
        with torch.no_grad():
            over = model(ids, labels=ids, batch_part=WHOLE_BATCH.thinking()).thought_over
        for start in range(0, batch, texts):
            rows = slice(start, min(start + texts, batch))
            model(ids[rows], labels=ids[rows], batch_part=over.part(rows)).loss.backward()

    def step(gradients: Callable[[], None]) -> None:
        gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    runs: list[tuple[str, Way, Callable[[], None]]] = [
        (title, way, whole if way.texts is None else functools.partial(in_parts, way.texts))
        for title, way in WAYS.items()
        if way.texts is None or way.texts < batch
    ]
    published = Way("off", graphs="off")
    runs.append(
        (
            "sequential, dense (as published)",
            published,
            lambda: sequential_step(model, ids).backward(),
        )
    )
    table: Table = {}
    for title, way, gradients in runs:
        run = functools.partial(step, gradients)
        with run_as(model, way):
            peak = peak_mb(run)
            if peak is None:
                print(f"  {title}: does not fit this device")
                optimizer.zero_grad(set_to_none=True)
                continue
            row = table[title] = compare({title: run}, rounds, graph=False)[title]
        if ON_GPU:
            row["peak_mb"] = peak
        row["times_ours"] = row["ms"] / next(iter(table.values()))["ms"]
        share = float(torch.stack(rewarded).mean()) if rewarded else 0.5
        row.update(rates(model, batch, length, share, row["ms"]))
        measured(table)
    return table


def rates(
    model: QuietStarForCausalLM, batch: int, length: int, rewarded: float, ms: float
) -> dict[str, float]:
    """What a step needs, and its share of a product's rate, without the rollout and with."""
    sizes = decoder_sizes(model.base.config)
    flops = training_step_flops(model.config, sizes, batch, length, rewarded=rewarded)
    rate = matmul_gflop_per_s()
    found = {"needed_gflop": flops.needed / 1e9, "matmul_gflop_per_s": rate}
    found["utilisation"] = flops.needed / 1e6 / ms / rate
    found["utilisation_with_rollout"] = (flops.needed + flops.rollout) / 1e6 / ms / rate
    return found


def matmul_gflop_per_s() -> float:
    """The rate of a bf16 product on this device."""
    if ON_GPU:
        return device.ceilings()["matmul_bfloat16_gflop_per_s"]
    a = torch.randn(512, 512).bfloat16()
    row = compare({"product": lambda: a @ a}, rounds=3)["product"]
    return 2e-6 * 512**3 / row["best_ms"]


def peak_mb(run: Callable[[], object]) -> float | None:
    """Most memory allocated during two calls, everything included, in MB; None if it does not fit."""
    gc.collect()
    if not ON_GPU:
        run()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        run()
        run()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() / 1e6


# The texts of a step: for the larger model one, the paper's batch of 8 by accumulation.
STEPS = [("Llama-3.2-1B", 4), ("Mistral-7B", 1), ("Mistral-7B", 2), ("Llama-3.2-1B", 1)]


@needs_gpu
@pytest.mark.parametrize(("name", "batch"), STEPS)
def bench_training_step_on_a_gpu(name: str, batch: int) -> None:
    """Time, memory, utilisation, and the factor to the published algorithm where that fits."""
    title = f"training step, {name} shape, {batch} x 256 tokens, T 9, K 4, R 2"
    table = training_step(name, batch, 256, measured=lambda table: record("gpu_step", title, table))
    for row_name, row in table.items():
        print(f"  {row_name:42} {row['peak_mb']:9.0f} MB   utilisation {row['utilisation']:.1%}")
    gc.collect()
    torch.cuda.empty_cache()

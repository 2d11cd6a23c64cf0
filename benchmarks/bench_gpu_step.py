"""A whole training step of large decoders on a GPU, and a slot step beside a decoding step.

Mistral-7B and Llama-3.2-1B, randomly initialised from the shapes below (nothing is downloaded), all in
bf16 as the paper's code: weights, gradients and AdamW's states. The paper's settings: n_ahead 12 (9
thought tokens), 4 ahead, 2 rationales, 256 tokens of text. A step is forward, backward, AdamW and
dropping the gradients; memory is the most that was allocated, everything included. Utilisation is
``benchmarks.flops`` (what the algorithm needs) over the time and the measured rate of a bf16 product.

``pytest benchmarks/bench_gpu_step.py -s`` on a machine with a GPU; without one they skip, and
tests/benchmarks/test_benchmark_step.py runs the same functions with a tiny decoder.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, StaticCache

from benchmarks import DEVICE, ON_GPU, PAPER, Table, compare, device, listening, needs_gpu, record
from benchmarks.flops import training_step_flops
from benchmarks.sequential import sequential_step
from quietstar import QuietStarForCausalLM
from quietstar.modeling.text_cache import cache_argument
from quietstar.plan.costs import decoder_sizes
from quietstar.thinking.cuda_graphs import run_slots, use_graphs
from quietstar.thinking.layout import LayerKeys, ThoughtLayout
from quietstar.thinking.slots import SlotRun, depth_of_end

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
    checkpointing: bool = False


WAYS = {
    "quietstar": Way(),
    "quietstar, outputs of the rollout reused": Way(reuse_rollout=True),
    "quietstar, layers as they are": Way("off"),
    "quietstar, layers as they are, no graph": Way("off", graphs="off"),
    "quietstar, gradient checkpointing": Way(checkpointing=True),
}


@contextlib.contextmanager
def run_as(model: QuietStarForCausalLM, way: Way) -> Iterator[None]:
    """The model in this way, and as it was afterwards."""
    model.fuse_layers(way.fused_layers)
    model.reuse_rollout(way.reuse_rollout)
    if way.checkpointing:
        model.gradient_checkpointing_enable()
    try:
        with use_graphs(way.graphs):
            yield
    finally:
        model.gradient_checkpointing_disable()
        model.reuse_rollout(False)
        model.fuse_layers("off")


def training_step(name: str, batch: int, length: int, rounds: int = 5) -> Table:
    """Time, memory and utilisation of our step in several ways, and of the published algorithm.

    One after the other, each timed ``rounds`` times when it is warm: what one has captured and compiled
    is gone when the next begins. What runs out of memory is left out of the table, and said so.
    """
    model = build(name).train()
    ids = torch.randint(0, SHAPES[name]().vocab_size - 2, (batch, length), device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=ON_GPU)
    rewarded = []

    def step(loss_of: Callable[[], torch.Tensor]) -> None:
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def ours() -> torch.Tensor:
        output = model(ids, labels=ids)
        rewarded.append((output.advantage.detach() > 0).float().mean())
        return output.loss

    runs: list[tuple[str, Way, Callable[[], torch.Tensor]]]
    runs = [(title, way, ours) for title, way in WAYS.items()]
    sequential = functools.partial(sequential_step, model, ids)
    runs.append(("sequential, dense (as published)", Way("off", graphs="off"), sequential))
    table: Table = {}
    for title, way, loss_of in runs:
        run = functools.partial(step, loss_of)
        with run_as(model, way):
            peak = peak_mb(run)
            if peak is None:
                print(f"  {title}: does not fit this device")
                optimizer.zero_grad(set_to_none=True)
                continue
            table[title] = compare({title: run}, rounds, graph=False)[title]
        if ON_GPU:
            table[title]["peak_mb"] = peak
        table[title]["times_ours"] = table[title]["ms"] / next(iter(table.values()))["ms"]
    flops = training_step_flops(
        model.config,
        decoder_sizes(model.base.config),
        batch,
        length,
        rewarded=float(torch.stack(rewarded).mean()),
    )
    rate = matmul_gflop_per_s()
    for title, row in table.items():
        row["needed_gflop"] = flops.needed / 1e9
        row["matmul_gflop_per_s"] = rate
        row["utilisation"] = flops.needed / 1e9 / row["ms"] * 1e3 / rate
        if title.startswith("quietstar"):
            both = flops.needed + flops.rollout
            row["utilisation_with_rollout"] = both / 1e9 / row["ms"] * 1e3 / rate
    return table


def slot_step(name: str, batch: int, context: int, rounds: int = 5) -> Table:
    """One slot of a thought behind each of ``batch`` texts, beside a decoding step of the decoder.

    A slot's time is a chain's (start, nine tokens drawn, end) over its length. A decoding step runs one
    token per row and takes the most likely next: with a growing cache, as ``generate`` does it, and with
    a static one; on a GPU both are graphs, too.
    """
    model = build(name).eval()
    with torch.no_grad():
        chain, slots = slot_chain(model, batch, context)
        runs = {"slot step": chain}
        for title, make in (
            ("decoding step, growing cache", growing_step),
            ("decoding step, static cache", static_step),
        ):
            runs[title] = captured(make(model, batch, context))
        table = compare(runs, rounds, graph=False)
    for key in ("ms", "best_ms"):
        table["slot step"][key] /= slots
    for row in table.values():
        row["times_ours"] = row["ms"] / table["slot step"]["ms"]
    return table


def slot_chain(
    model: QuietStarForCausalLM, batch: int, context: int
) -> tuple[Callable[[], object], int]:
    """A thought behind every text from given keys, as generation runs it, and its number of slots."""
    config, base = model.config, model.base.config
    slots = depth_of_end(config)
    whole = torch.full((batch, 1), context, dtype=torch.int32, device=DEVICE)
    anchors = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
    steps = ThoughtLayout(torch.zeros_like(whole), whole, anchors, slots, phase="slot")
    for layer, (keys, values) in enumerate(random_keys(base, batch, context)):
        steps.keys[layer] = LayerKeys(keys, values)
    meta = model.thought_embedding(config.embedding_scale)

    def chain() -> object:
        with use_graphs("auto"):
            return run_slots(model.base, config, SlotRun(meta, anchors, steps, slots, 1.0, 1))

    return chain, slots


def growing_step(model: QuietStarForCausalLM, batch: int, context: int) -> Callable[[], object]:
    """One token more behind a cache of ``context`` tokens, which is as long again afterwards."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(random_keys(model.base.config, batch, context)):
        cache.update(keys, values, layer)
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    ids = torch.ones(batch, 1, dtype=torch.int64, device=DEVICE)
    positions = torch.full_like(ids, context)

    def step() -> object:
        found = next_tokens(model, ids, positions, cache)
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        return found

    return step


def static_step(model: QuietStarForCausalLM, batch: int, context: int) -> Callable[[], object]:
    """The same with a cache whose tensors stay."""
    cache = StaticCache(model.base.config, max_cache_len=context + 1)
    for layer, (keys, values) in enumerate(random_keys(model.base.config, batch, context)):
        cache.update(keys, values, layer)
    lengths = [layer.cumulative_length for layer in cache.layers]
    ids = torch.ones(batch, 1, dtype=torch.int64, device=DEVICE)
    positions = torch.full_like(ids, context)

    def step() -> object:
        found = next_tokens(model, ids, positions, cache)
        torch._foreach_sub_(lengths, 1)
        return found

    return step


def next_tokens(
    model: QuietStarForCausalLM, ids: torch.Tensor, positions: torch.Tensor, cache: Any
) -> torch.Tensor:
    """The most likely tokens behind one given token per row."""
    decoder = model.base.base_model
    hidden = decoder(
        input_ids=ids, position_ids=positions, use_cache=True, **cache_argument(decoder, cache)
    ).last_hidden_state
    return model.thought_decoder.output.logits(hidden[:, -1]).argmax(-1)


def random_keys(config: Any, batch: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer, [B, Hkv, N, D]."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (2, batch, config.num_key_value_heads, length, size)
    pairs = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(config.num_hidden_layers))
    return [(pair[0], pair[1]) for pair in pairs]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a graph on a GPU, elsewhere as it is."""
    if not ON_GPU:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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
STEPS = [("Llama-3.2-1B", 1), ("Llama-3.2-1B", 4), ("Mistral-7B", 1), ("Mistral-7B", 2)]


@needs_gpu
@pytest.mark.parametrize(("name", "batch"), STEPS)
def bench_training_step_on_a_gpu(name: str, batch: int) -> None:
    """Time, memory, utilisation, and the factor to the published algorithm where that fits."""
    title = f"training step with AdamW, {name}, {batch} x 256 tokens, bf16"
    table = training_step(name, batch, 256)
    record("gpu_step", title, table)
    for row_name, row in table.items():
        print(f"  {row_name:36} {row['peak_mb']:9.0f} MB   utilisation {row['utilisation']:.1%}")
    gc.collect()
    torch.cuda.empty_cache()


@needs_gpu
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Mistral-7B"])
def bench_slot_step_on_a_gpu(name: str, batch: int) -> None:
    """A slot step may take 1.2 times a decoding step."""
    title = f"slot step, {name}, {batch} rows behind 256 tokens, bf16"
    table = slot_step(name, batch, 256, rounds=20)
    record("gpu_step", title, table)
    gc.collect()
    torch.cuda.empty_cache()

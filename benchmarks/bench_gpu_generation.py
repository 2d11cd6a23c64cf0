"""Generation on a GPU: tokens with thoughts, and a slot step beside a decoding step.

The decoders of bench_gpu_step.py, T = 9 thought tokens, behind 256 tokens of text, one row and 16.

``pytest benchmarks/bench_gpu_generation.py -s`` on a machine with a GPU; without one they skip, and
tests/benchmarks/test_benchmark_step.py runs the same functions with a tiny decoder.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from benchmarks import DEVICE, ON_GPU, Table, compare, needs_gpu, record
from benchmarks.bench_gpu_step import SHAPES, build
from quietstar import QuietStarForCausalLM
from quietstar.modeling.text_cache import cache_argument
from quietstar.thinking.cuda_graphs import run_slots, use_graphs
from quietstar.thinking.layout import LayerKeys, ThoughtLayout
from quietstar.thinking.slots import SlotRun, depth_of_end

pytestmark = pytest.mark.device

STEM = "gpu_generation"


def generation(name: str, batch: int, context: int, new: int = 8, rounds: int = 5) -> Table:
    """A new token behind ``context`` tokens in each of ``batch`` rows, greedy: the time of ``new`` of
    them, the prompt's pass included, over their number."""
    model = build(name).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(0, SHAPES[name]().vocab_size - 2, (batch, context), device=DEVICE)
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def thinking(graphs: str, **more: str) -> Callable[[], object]:
        def run() -> object:
            with use_graphs(graphs):
                return model.generate(ids, **options, **more)

        return run

    runs = {
        "quietstar": thinking("auto"),
        "quietstar, no graph": thinking("off"),
        "plain generation, no thoughts": thinking("auto", thinking="never"),
    }
    table = compare(runs, rounds, graph=False)
    for row in table.values():
        row["ms"], row["best_ms"] = row["ms"] / new, row["best_ms"] / new
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


def clear() -> None:
    """Memory for the next one."""
    gc.collect()
    torch.cuda.empty_cache()


@needs_gpu
@pytest.mark.parametrize("batch", [16, 1])
def bench_generation_on_a_gpu(batch: int) -> None:
    """A row's token, and sixteen rows'."""
    rows = "" if batch == 1 else f", {batch} rows"
    title = f"generation, a token after 256, Llama-3.2-1B shape{rows}, 9 + 2 slots"
    record(STEM, title, generation("Llama-3.2-1B", batch, 256))
    clear()


@needs_gpu
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Mistral-7B"])
def bench_slot_step_on_a_gpu(name: str, batch: int) -> None:
    """A slot step may take 1.2 times a decoding step."""
    title = f"slot step, {name}, {batch} rows behind 256 tokens, bf16"
    table = slot_step(name, batch, 256, rounds=20)
    record(STEM, title, table)
    clear()

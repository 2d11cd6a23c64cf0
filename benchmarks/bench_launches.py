"""Kernel launches of a training step of the Mistral-7B shape by part, counted without a GPU.

What is counted and how: :mod:`benchmarks.launches`. Sizes are the model's own, at the paper's settings
with one text of 256 tokens, and layers a few: launches are linear in their number, which a third depth
confirms. ``pytest benchmarks/bench_launches.py -s`` counts, in some minutes, and writes
``benchmarks/results/launches.json``, from which docs/gpu_paths.md has its table.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import date
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import PAPER, RESULTS, listening
from benchmarks.bench_gpu_step import SHAPES
from benchmarks.launches import LARGE, Launches, adamw_launches, counted
from benchmarks.launches_compiled import compiled_for_cuda
from quietstar import QuietStarForCausalLM
from quietstar.thinking import rollout
from quietstar.thinking.decoder import ThoughtDecoder

WAYS = {"layers as they are": "off", "compiled layers": "compile"}
HEADS, OPTIMIZER = "heads and losses", "optimizer"
PARTS = (
    "rollout, text",
    "rollout, slots",
    "rollout, beside its passes",
    "packed pass, forward",
    "packed pass, backward",
    HEADS,
    OPTIMIZER,
)
# Two tell what a layer adds, a third whether that is all.
DEPTHS = (1, 2, 3)
FILE = RESULTS / "launches.json"
# Counted once by this counter over the sources of that commit, beside what a profile of the same step on
# an H200 lists: the 60 kernels that took most of the time, and what libraries launch around products.
CHECK = {
    "commit": "865a120",
    "counted": 18812,
    "profiled": 18966,
    "profiled_library_extras": 742,
    "counted_products": 2933,
    "profiled_products": 2933,
}

Table = dict[str, dict[str, int]]


def build(name: str, layers: int | None = None) -> QuietStarForCausalLM:
    """A model of one of the shapes, with so many layers, whose values are zeros."""
    torch.manual_seed(0)
    config = SHAPES[name]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    decoder = decoder.to_empty(device="cpu")
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        if tensor.nbytes < LARGE:
            tensor.detach().zero_()
    # Zeros in all passes are no check of the decoder.
    model: QuietStarForCausalLM = listening(decoder, **PAPER, self_check=False)
    return model.to(torch.bfloat16).train()


def count_step(model: QuietStarForCausalLM, ids: Tensor, way: str = "off") -> Launches:
    """Launches of a model's second step on ids [B, N], when all is compiled; without an optimizer's.

    Args:
        way: ``"off"`` or ``"compile"``, of ``model.fuse_layers``.
    """
    model.fuse_layers(way)
    try:
        with counted() as launches, compiled_for_cuda(launches), _parts(launches):
            for _ in range(2):
                launches.found.clear()
                launches.part = HEADS
                model(ids, labels=ids).loss.backward()
                model.zero_grad(set_to_none=True)
    finally:
        model.fuse_layers("off")
    return launches


@contextlib.contextmanager
def _parts(launches: Launches) -> Iterator[None]:
    """Inside the block every operator is counted for the part that it belongs to."""

    def titled(home: Any, name: str, part: str) -> Any:
        function = getattr(home, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            with launches.within(part):
                return function(*args, **kwargs)

        return mock.patch.object(home, name, run)

    packed = ThoughtDecoder.packed

    def packed_pass(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with launches.within("packed pass, forward"):
            hidden = packed(*args, **kwargs)
        return _Behind.apply(launches, *hidden)  # type: ignore[no-any-return]

    with (
        titled(ThoughtDecoder, "rollout", "rollout, beside its passes"),
        titled(rollout, "text_pass", "rollout, text"),
        titled(rollout, "run_slots", "rollout, slots"),
        mock.patch.object(ThoughtDecoder, "packed", packed_pass),
    ):
        yield


class _Behind(torch.autograd.Function):
    """The end of the packed pass: what comes before it in a backward pass is the heads'."""

    @staticmethod
    def forward(ctx: Any, launches: Launches, *hidden: Tensor) -> tuple[Tensor, ...]:
        ctx.launches = launches
        return tuple(each.view_as(each) for each in hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.launches.part = "packed pass, backward"
        return None, *grads


def extrapolated(counts: dict[int, Table], layers: int) -> Table:
    """The counts of a model with so many layers from those with few.

    Args:
        counts: by number of layers, of three.

    Raises:
        ValueError: if they do not grow by the same number with every layer.
    """
    first, second, third = sorted(counts)
    table: Table = {}
    for part, kinds in counts[third].items():
        for kind in kinds:
            a, b, c = (counts[depth].get(part, {}).get(kind, 0) for depth in (first, second, third))
            per_layer, rest = divmod(b - a, second - first)
            if rest or c != b + (third - second) * per_layer:
                raise ValueError(
                    f"{part} has {a}, {b} and {c} {kind} with {first}, {second} and {third} layers;"
                    " expected the same number more with every layer"
                )
            table.setdefault(part, {})[kind] = a + (layers - first) * per_layer
    return table


def count_shape(name: str, length: int) -> dict[str, Table]:
    """Launches of a training step on one text, by way, part and kind."""
    ids = torch.randint(0, SHAPES[name]().vocab_size - 2, (1, length))
    layers = SHAPES[name]().num_hidden_layers
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(SHAPES[name](), dtype=torch.bfloat16)
    found: dict[str, Table] = {}
    for title, way in WAYS.items():
        counts = {}
        for depth in DEPTHS:
            model = build(name, depth)
            counts[depth] = count_step(model, ids, way).table()
        found[title] = extrapolated(counts, layers)
        heads = [p for n, p in model.named_parameters() if not n.startswith("base.")]
        found[title][OPTIMIZER] = {"AdamW": adamw_launches([*whole.parameters(), *heads])}
    return found


def bench_launches_of_a_step() -> None:
    """The table of docs/gpu_paths.md."""
    found = count_shape("Mistral-7B", 256)
    content = {
        "what": "Training step, Mistral-7B shape, 1 x 256 tokens, T 9, K 4, R 2",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "depths": DEPTHS,
        "ways": found,
        "check": CHECK,
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    for title, table in found.items():
        print(f"\n{title}: {sum(sum(kinds.values()) for kinds in table.values())}")
        for part in PARTS:
            print(f"  {part:28} {sum(table[part].values()):6}   {table[part]}")

"""Bytes and operations of a training step, and which batches fit a GPU.

The formulas are those of docs/scaling.md, counted for decoders with RMSNorm and a gated MLP (Llama,
Mistral, Qwen, ...) and checked against measured peaks by tests/plan/test_plan.py. A step's rows are
``L = B (N + A + (S-1) M)``: B texts of N tokens, and for each of A anchors a start slot and S-1 more for
each of its rationales (M = anchors x rationales).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from quietstar.config import QuietStarConfig
from quietstar.errors import UserError
from quietstar.plan.hybrids import Hybrid, LayerKind, Shape
from quietstar.plan.sizes import Sizes
from quietstar.plan.sizes import decoder_sizes as decoder_sizes
from quietstar.plan.vocabulary import CHUNK_BYTES as CHUNK_BYTES
from quietstar.plan.vocabulary import CHUNK_ROWS as CHUNK_ROWS
from quietstar.plan.vocabulary import drawn_logits_bytes, vocabulary_bytes

# What a GPU has in use before the first tensor, and what an allocator loses to gaps.
CONTEXT_BYTES, GAPS = 0.8e9, 1.06


@dataclass(frozen=True)
class Step:
    """How a step is run.

    Args:
        batch, length: B texts of N tokens on a device.
        precision: ``float32``, ``bfloat16`` (weights and all), or ``autocast`` (fp32 weights, or a
            frozen decoder in bf16, computing in bf16).
        checkpointing: gradient checkpointing of the layers.
        keep_products: it keeps the outputs of products and of the attention.
        rank: of adapters, None: everything is trained.
        quantized: the frozen decoder's linear layers are in 4 bits.
        processes: GPUs; sharded: FSDP2 over them, otherwise DDP.
        optimizer_bytes: Adam's states per trained parameter, None: two in the parameters' dtype.
        reuse_rollout: linear layers take the rollout's rows from the rollout.
        rows_per_backward: so many of the texts go through the packed pass at a time, None: all.
        device: ``cuda`` or ``cpu``, which hold different amounts of logits at a time.
    """

    batch: int
    length: int
    precision: str = "float32"
    checkpointing: bool = False
    keep_products: bool = False
    rank: int | None = None
    quantized: bool = False
    processes: int = 1
    sharded: bool = False
    optimizer_bytes: float | None = None
    reuse_rollout: bool = False
    rows_per_backward: int | None = None
    device: str = "cuda"

    @property
    def part(self) -> Step:
        """What goes through the packed pass at a time, as a step of its own."""
        rows = min(self.batch, self.rows_per_backward or self.batch)
        return dataclasses.replace(self, batch=rows, rows_per_backward=None)


@dataclass(frozen=True)
class Rows:
    """How many rows each part of a step has; ``rollout`` of them are those of the rollout."""

    text: int
    columns: int
    rollout: int
    packed: int
    talk: int
    base: int
    scored: int

    @staticmethod
    def of(config: QuietStarConfig, step: Step) -> Rows:
        sampled = config.thought_kind == "sampled"
        rationales = config.num_rationales if sampled else 1
        anchors = anchors_per_text(config, step.length) if config.thinks else 0
        text, starts = step.batch * step.length, step.batch * anchors
        columns = starts * rationales
        drawn = config.thought_length if sampled and anchors else 0
        return Rows(
            text=text,
            columns=columns,
            rollout=text + (starts + (drawn - 1) * columns if drawn else 0),
            packed=text + starts + (config.num_slots - 1) * columns,
            talk=config.talk_length * columns,
            base=step.batch * (step.length - 1),
            scored=config.thought_length * columns if sampled else 0,
        )


def anchors_per_text(config: QuietStarConfig, length: int) -> int:
    """How many positions of a text of so many tokens think; of a row with one completion, one.

    Raises:
        UserError: for a rule by which that depends on the text.
    """
    rule, number = config.parse_think_at()
    if rule == "loss":
        raise UserError(
            f"think_at is {config.think_at!r}, by which the number of thoughts depends on the text;"
            " expected another rule: plan with the share that you expect, e.g. 'random:0.3'"
        )
    share = {"stride": 1 / number, "completion": 0.0}.get(rule, number)
    return max(1, round(length * share))


def _layer_row(sizes: Sizes, step: Step) -> float:
    """Bytes that one layer keeps for the backward pass, per row."""
    d, q, kv, ff = sizes.width, sizes.query, sizes.key, sizes.inner
    s = 4 if step.precision == "float32" else 2
    # Of two norms: input, normalised, scaled. In bf16 the input is kept in fp32; under autocast all but
    # what the linear layers take, which is cast once for each of them (q, k, v; gate, up).
    norms = {"float32": 24 * d, "bfloat16": 16 * d, "autocast": 26 * d}[step.precision]
    # Queries, keys and values; the attention's output twice; gate, its activation, up, their product.
    kept = norms + s * (3 * q + 2 * kv + 4 * ff) + 4 * (sizes.heads + 2)
    if step.rank is not None:
        # A frozen scale needs no normalised input; the seven low-rank products are kept.
        kept += 7 * step.rank * s - 2 * d * (2 if step.precision == "bfloat16" else 4)
    return kept


def _products_row(sizes: Sizes, step: Step) -> float:
    """Bytes of the products of one layer that checkpointing keeps, per row."""
    if not step.keep_products:
        return 0.0
    s = 4 if step.precision == "float32" else 2
    # Queries, keys and values, gate and up, two outputs; with adapters the updates of all of them, too.
    linear = s * sizes.outputs
    if step.rank is not None:
        linear = 2 * linear + sizes.linears * step.rank * s
    # The attention's output with a number per head.
    return (linear + sizes.attending * (s * sizes.query + 4 * sizes.heads)) / sizes.layers


def _shared_row(sizes: Sizes, step: Step) -> float:
    """Bytes of kept products that a layer, when it is computed again, would keep itself, per row: what
    goes through a rotary embedding, an update or a residual add is another tensor then."""
    if not step.keep_products:
        return 0.0
    s = 4 if step.precision == "float32" else 2
    attention = s * sizes.query + 4 * sizes.heads
    if step.rank is not None:
        return attention + 7 * step.rank * s
    return attention + s * (sizes.key + 2 * sizes.inner)


def _transient_row(sizes: Sizes, step: Step) -> float:
    """Bytes of gradients at the widest place of a layer's backward pass, per row."""
    s = 4 if step.precision == "float32" else 2
    # Under autocast the residual's gradient takes the place of an output that is not made again.
    return 2 * sizes.inner * s + (0 if step.precision == "autocast" else s * sizes.width)


class _Kept(NamedTuple):
    """Bytes of the decoder's layers: what ``all`` of them keep for the backward pass, and of the one
    that needs most what it keeps, what of that checkpointing has kept already, and what its backward
    pass has in hand besides."""

    all: float
    layer: float
    shared: float
    in_hand: float


def _layers_kept(config: QuietStarConfig, sizes: Sizes, step: Step, rows: Rows) -> _Kept:
    if sizes.hybrid is None:
        layer, in_hand = rows.packed * _layer_row(sizes, step), rows.packed * _transient_row(sizes, step)
        return _Kept(sizes.layers * layer, layer, rows.packed * _shared_row(sizes, step), in_hand)
    kinds = _kinds(config, sizes.hybrid, step)
    adapters = 0.0
    if step.rank is not None:
        s = 4 if step.precision == "float32" else 2
        adapters = rows.packed * step.rank * s * sizes.linears / sizes.layers
    most = max(kinds, key=lambda kind: kind.kept + kind.in_hand)
    # An adapter's update makes another tensor of what a linear layer gave.
    shared = step.batch * most.shared if step.keep_products and step.rank is None else 0.0
    whole = sum(kind.count * (step.batch * kind.kept + adapters) for kind in kinds)
    return _Kept(whole, step.batch * most.kept + adapters, shared, step.batch * most.in_hand)


def _kinds(config: QuietStarConfig, hybrid: Hybrid, step: Step) -> tuple[LayerKind, ...]:
    anchors = anchors_per_text(config, step.length) if config.thinks else 1
    rationales = config.num_rationales if config.thought_kind == "sampled" else 1
    shape = Shape(step.length, anchors, rationales, config.num_slots)
    return hybrid.kinds(shape, step.precision, step.rank is not None)


def activation_bytes(config: QuietStarConfig, sizes: Sizes, step: Step) -> float:
    """Peak of one step beyond weights and optimiser states, gradients included."""
    parts, step = math.ceil(step.batch / step.part.batch), step.part
    rows = Rows.of(config, step)
    d, v = sizes.width, sizes.vocabulary
    s = 4 if step.precision == "float32" else 2
    wide = 2 if step.precision == "bfloat16" else 4
    trained = _trained(sizes, step)
    gradient = wide if step.rank is None else 4
    share = step.processes if step.sharded else 1
    positions = rows.packed * 2 * sizes.head_dim * wide
    whole, layer, shared, inside = _layers_kept(config, sizes, step, rows)
    if step.checkpointing:
        whole = sizes.layers * rows.packed * (d * wide + _products_row(sizes, step))
    # Autocast keeps a cast of every weight for the backward pass.
    cast = 2 * sizes.linear / sizes.layers if step.precision == "autocast" and not step.quantized else 0
    stack = whole + positions + (0 if step.checkpointing else sizes.layers * cast)

    # 1. The loss: final norm, mixing head, both cross entropies with their gradients.
    final = rows.packed * {"float32": 12, "bfloat16": 8, "autocast": 12}[step.precision] * d
    heads = d * s * (4 * rows.talk + 2 * (rows.talk + rows.base))
    talking = vocabulary_bytes(sizes, step, rows.talk + rows.base)
    # While the policy term is computed the talk's gradient of the output layer waits. About half of the
    # thoughts have no positive advantage.
    waiting = v * d * ((4 if step.rank is None else 0) + (2 if step.precision == "autocast" else 0))
    scoring = 2 * d * s * rows.scored + waiting + vocabulary_bytes(sizes, step, rows.scored // 2)
    loss = stack + final + heads + max(talking, scoring)

    # 2. The backward pass, at its beginning (all layers kept) and at its end (all gradients there).
    inside += layer + cast - shared if step.checkpointing else 0
    first = sizes.mixing + (v * d + d * sizes.inner if step.rank is None else 0)
    start = stack + inside + gradient * first
    end = (layer if not step.checkpointing else 0) + positions + inside
    not_yet = 0
    if step.rank is None:
        not_yet = sizes.linear // sizes.layers + (v * d if sizes.embeddings > v * d else 0)
    end += gradient * (trained - not_yet) / share
    # The gradients of the parts before are there all the time.
    before = gradient * trained / share if parts > 1 else 0.0
    return max(loss + before, start + before, end + gradient * not_yet / share if parts > 1 else end)


def _trained(sizes: Sizes, step: Step) -> float:
    if step.rank is None:
        return sizes.all
    return step.rank * sizes.ends + sizes.mixing


def static_bytes(sizes: Sizes, step: Step) -> float:
    """Weights and optimiser states on one device."""
    share = step.processes if step.sharded else 1
    trained = _trained(sizes, step)
    if step.rank is None:
        item = 2 if step.precision == "bfloat16" else 4
        weights: float = item * sizes.all
    else:
        frozen = 4 if step.precision == "float32" else 2
        item = 4
        linear = sizes.linear * (0.52 if step.quantized else frozen)
        weights = linear + frozen * (sizes.all - sizes.mixing - sizes.linear) + 4 * trained
    states = (2 * item if step.optimizer_bytes is None else step.optimizer_bytes) * trained
    return (weights + states) / share


def rollout_bytes(config: QuietStarConfig, sizes: Sizes, step: Step) -> float:
    """Peak of the rollout beyond weights and states: keys, values, and with FSDP2 the whole decoder."""
    rows = Rows.of(config, step)
    s = 4 if step.precision == "float32" else 2
    if sizes.hybrid is None:
        cache = rows.text + config.num_slots * rows.columns
        keys: float = 2 * sizes.key * sizes.layers * cache * s
    else:
        kinds = _kinds(config, sizes.hybrid, step)
        keys = step.batch * sum(kind.count * kind.remembered for kind in kinds)
    one = max(rows.text, rows.columns) * (3 * sizes.inner + 4 * sizes.width) * s
    logits = min(drawn_logits_bytes(step), rows.columns * sizes.vocabulary * s)
    gathered = s * sizes.all if step.sharded and step.processes > 1 else 0
    return keys + one + logits + gathered


def peak_bytes(config: QuietStarConfig, sizes: Sizes, step: Step) -> float:
    """Peak memory of one device, a GPU's own overhead not counted."""
    trained = _trained(sizes, step)
    item = 2 if step.precision == "bfloat16" and step.rank is None else 4
    # DDP copies gradients into buckets; FSDP2 holds two gathered layers.
    extra = 0.0
    if step.processes > 1:
        extra = 2 * 4 * sizes.body / sizes.layers if step.sharded else item * trained
    step_peak = activation_bytes(config, sizes, step) + extra
    kept = kept_bytes(config, sizes, step)
    return static_bytes(sizes, step) + kept + max(step_peak, rollout_bytes(config, sizes, step))


def kept_bytes(config: QuietStarConfig, sizes: Sizes, step: Step) -> float:
    """What the rollout's linear layers gave, where the packed pass takes it; a CUDA graph holds all of
    it for good."""
    if not reuses(step):
        return 0.0
    item = 4 if step.precision == "float32" else 2
    return float(Rows.of(config, step).rollout * sizes.outputs * item)


def reuses(step: Step) -> bool:
    """Whether the packed pass takes outputs of the rollout; a layer in 4 bits has none to take."""
    return step.reuse_rollout and not step.checkpointing and not step.quantized


def step_flops(config: QuietStarConfig, sizes: Sizes, step: Step) -> dict[str, float]:
    """Operations of one step on one device, by part (a multiply-add is two).

    ``rollout`` and ``packed`` are the decoder's body, ``vocabulary`` all products with the output layer.
    """
    rows = Rows.of(config, step)
    n, slots = step.length, config.num_slots
    linear, attention = 2 * sizes.linear, 4 * sizes.query * sizes.attending
    text_pairs = rows.text * (n + 1) / 2
    passes = 2.0 if step.rank is not None else 3.0
    if step.checkpointing and not step.keep_products:
        # Computed again up to the layer's last product, which nothing needs.
        last = sizes.layers * sizes.width * sizes.inner if sizes.hybrid is None else 0
        passes += 1 - last / sizes.linear
    multiplied: float = linear * rows.packed
    scored = attention * (text_pairs + slots * rows.columns * ((n + 1) / 2 + (slots + 1) / 2))
    drawn = config.thought_length if config.thought_kind == "sampled" else 0
    rollout: float = linear * rows.rollout
    rollout += attention * (text_pairs + drawn * rows.columns * ((n + 1) / 2 + (drawn + 1) / 2))
    if sizes.hybrid is not None:
        handed_on = step.batch * sum(k.count * k.products for k in _kinds(config, sizes.hybrid, step))
        scored += handed_on
        rollout += handed_on * rows.rollout / rows.packed
    head = 2 * sizes.vocabulary * sizes.width
    products = 3 if step.rank is None else 2
    learned = rows.talk + rows.base + rows.scored / 2
    return {
        "rollout": rollout if config.thinks else 0.0,
        "packed": passes * (multiplied + scored) - (linear * rows.rollout if reuses(step) else 0.0),
        "vocabulary": head * (drawn * rows.columns + products * learned),
    }


def fits(config: QuietStarConfig, sizes: Sizes, step: Step, gpu_bytes: float) -> bool:
    """Whether a step fits a GPU, its context and the allocator's gaps counted."""
    return peak_bytes(config, sizes, step) * GAPS + CONTEXT_BYTES <= gpu_bytes


# Texts per device that are tried.
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def largest_batch(config: QuietStarConfig, sizes: Sizes, step: Step, gpu_bytes: float) -> int:
    """The largest of :data:`BATCHES` that fits a device; 0 if not even one text does."""
    best = 0
    for batch in BATCHES:
        if not fits(config, sizes, dataclasses.replace(step, batch=batch), gpu_bytes):
            break
        best = batch
    return best


def step_of(recipe: Any) -> Step:
    """The step that a recipe describes, on one device."""
    training, adapter = recipe.training, recipe.adapter
    mixed = bool(training.get("bf16") or training.get("fp16"))
    pure = recipe.model.dtype == "bfloat16" and adapter.rank is None
    names = "activation_checkpointing", "gradient_checkpointing"
    checkpointing = any(training.get(name) for name in names)
    kept = any((training.get(f"{name}_kwargs") or {}).get("keep") for name in names)
    optim = str(training.get("optim", "adamw_torch"))
    return Step(
        batch=int(training.get("per_device_train_batch_size", 8)),
        length=recipe.data.block_size,
        precision="bfloat16" if pure else "autocast" if mixed else "float32",
        checkpointing=checkpointing,
        keep_products=checkpointing and bool(kept),
        rank=adapter.rank,
        quantized=adapter.quantize == "4bit",
        optimizer_bytes=2.0 if "8bit" in optim else None,
        reuse_rollout=recipe.model.reuse_rollout,
        rows_per_backward=training.get("rows_per_backward"),
    )

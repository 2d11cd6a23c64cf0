"""Print which variants of a recipe fit GPUs of a given size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quietstar.config import QuietStarConfig
from quietstar.errors import UserError, blaming
from quietstar.plan.costs import (
    BATCHES,
    CONTEXT_BYTES,
    GAPS,
    Rows,
    Sizes,
    Step,
    decoder_sizes,
    fits,
    largest_batch,
    peak_bytes,
    reuses,
    static_bytes,
    step_flops,
    step_of,
)
from quietstar.plan.sizes import outline
from quietstar.recipes.decoder import decoder_config
from quietstar.recipes.recipe import Recipe
from quietstar.thinking.supported import check_supported
from quietstar.thinking.text_part import text_config_of

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PretrainedConfig

GB = 1e9
PER_LAYER = ("head_dim", "num_key_value_heads", "intermediate_size")
COUNTED = (
    "the plan counts decoders with RMSNorm and a gated MLP (Llama, Mistral, Qwen, ...), and hybrids"
)


def ways(own: Step) -> Iterator[tuple[str, Step]]:
    """The ways to run a recipe that are worth comparing, the recipe's own first."""
    change = functools.partial(dataclasses.replace, own)
    yield "as the recipe says", own
    if own.rank is not None and own.precision == "autocast":
        whole = change(rank=None, quantized=False, checkpointing=True)
        yield "everything trained, checkpointing", whole
    if not own.checkpointing:
        if not own.reuse_rollout and not own.quantized:
            yield "outputs of the rollout reused", change(reuse_rollout=True)
        yield "a row per backward pass", change(rows_per_backward=1)
        if not own.quantized:
            yield "checkpointing, products kept", change(checkpointing=True, keep_products=True)
        yield "gradient checkpointing", change(checkpointing=True)
    if own.rank is None:
        adapted = change(rank=16, precision="autocast", checkpointing=True)
        yield "adapters (rank 16), checkpointing", adapted
        yield "the same on 4 bits", dataclasses.replace(adapted, quantized=True)


def least_work(
    config: QuietStarConfig,
    sizes: Sizes,
    own: Step,
    memory: float,
    *,
    keeps: bool = True,
    cuts: bool = True,
    takes: bool = True,
) -> Step | None:
    """The way to run a step that fits ``memory`` bytes and computes least twice; None if none fits.

    With the rollout's outputs reused nothing is computed twice, without them the rollout's rows are.
    Rows at a time change nothing in that, but many at a time fill the GPU best: outputs are reused where
    that leaves at least half as many rows at a time. Then comes checkpointing that keeps products, and
    last that which keeps nothing.

    Args:
        keeps: whether checkpointing may keep products; cuts: whether rows may be taken a few at a time;
            takes: whether linear layers may take the rollout's outputs.
    """
    counts = [n for n in range(own.batch, 0, -1) if own.batch % n == 0] if cuts else [own.batch]

    def most_rows(kind: Step) -> Step | None:
        for count in counts:
            rows = None if count == own.batch else count
            way = dataclasses.replace(kind, rows_per_backward=rows)
            if fits(config, sizes, way, memory):
                return way
        return None

    change = functools.partial(dataclasses.replace, own, reuse_rollout=False)
    plain = most_rows(change(checkpointing=False, keep_products=False))
    if plain is not None:
        reusing = dataclasses.replace(plain, reuse_rollout=True)
        if takes and reuses(reusing) and config.thinks and config.thought_kind == "sampled":
            found = most_rows(reusing)
            if found is not None and 2 * found.part.batch >= plain.part.batch:
                return found
        return plain
    if keeps and not own.quantized:
        kept = most_rows(change(checkpointing=True, keep_products=True))
        if kept is not None:
            return kept
    return most_rows(change(checkpointing=True, keep_products=False))


def training_changes(own: Step, way: Step, training: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe's training section has to say to run in another way, resets included."""
    old = "gradient_checkpointing" in training
    name = "gradient_checkpointing" if old else "activation_checkpointing"
    changes: dict[str, Any] = {}
    if way.part.batch != own.part.batch:
        changes["rows_per_backward"] = way.rows_per_backward
    if way.checkpointing != own.checkpointing:
        changes[name] = way.checkpointing
    if way.checkpointing and way.keep_products != own.keep_products:
        changes[f"{name}_kwargs"] = {"keep": "products"} if way.keep_products else None
    return changes


def recipe_sizes(recipe: Recipe) -> tuple[QuietStarConfig, Sizes]:
    """The thought settings and the decoder's sizes; reads no weights."""
    from quietstar.modeling.pretrained import load_config
    from quietstar.recipes.build import build_tokenizer

    section = recipe.model
    if section.config is not None:
        known = section.config.get("vocab_size") is not None
        # The two tokens that the tokenizer may lack.
        decoder = decoder_config(section.config, 1 if known else len(build_tokenizer(section)) + 2, {})
    else:
        with blaming(f"cannot load the configuration of {section.name}"):
            assert section.name is not None  # checked with the recipe
            decoder = load_config(section.name, section.revision)
        decoder = text_config_of(decoder)
    where = "model.config" if section.config else f"cannot plan {section.name}"
    with blaming(where):
        made = outline(decoder)
    check_supported(made)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not hasattr(decoder, name):
            raise UserError(f"model type {decoder.model_type!r} has no {name}; {COUNTED}")
    if _differs(decoder):
        raise UserError(f"model type {decoder.model_type!r} has layers of several sizes; {COUNTED}")
    with blaming(where):
        sizes = decoder_sizes(decoder, made)
    if sizes.experts if sizes.hybrid is not None else sizes.linear != sizes.counted:
        raise UserError(
            f"model type {decoder.model_type!r} has other layers (experts, latent attention, an MLP"
            f" without a gate); {COUNTED}"
        )
    return QuietStarConfig(text_config=decoder, **recipe.thoughts), sizes


def _differs(config: PretrainedConfig) -> bool:
    """Whether a size differs from layer to layer, so that the configuration has no single one."""
    try:
        return any(not isinstance(getattr(config, name, 1), int | None) for name in PER_LAYER)
    except RuntimeError:
        return True


def _print_least_work(
    console: Console, recipe: Recipe, case: tuple[QuietStarConfig, Sizes, Step, float], size: str
) -> None:
    """What to change in the recipe, so that its batch fits one GPU and least of it is computed twice."""
    config, sizes, step, _ = case
    training, fused = recipe.training, recipe.model.fused_layers
    optim = str(training.get("optim", ""))
    alone = "lomo" in optim or optim.endswith("layerwise") or training.get("deepspeed")
    liger = fused == "liger" or training.get("use_liger_kernel")  # which overwrites what layers gave
    keeps = not training.get("torch_compile") and fused != "compile" and not liger
    way = least_work(*case, keeps=keeps, cuts=not alone, takes=not liger)
    if way is None:
        return
    changes = training_changes(step, way, training)
    reuse = {"reuse_rollout": way.reuse_rollout} if reuses(way) != reuses(step) else {}
    sections = {"model": reuse, "training": changes}
    says = ", ".join(f"{name}: {_as_yaml(lines)}" for name, lines in sections.items() if lines)
    says = says or "as the recipe says"
    peak = peak_bytes(config, sizes, way) / GB
    console.print(f"least computed twice, on one GPU of {size}: {says} (peak {peak:.2f} GB)")


def _as_yaml(changes: dict[str, Any]) -> str:
    lines = {key: "null" if value is None else str(value).lower() for key, value in changes.items()}
    return "{" + ", ".join(f"{key}: {value}" for key, value in lines.items()).replace("'", "") + "}"


def print_plan(console: Console, recipe: Recipe, memory: float, size: str) -> None:
    """Print the step's size and a table of what fits ``memory`` bytes, which the user calls ``size``."""
    config, sizes = recipe_sizes(recipe)
    if config.thinks and config.parse_think_at()[0] == "completion" and recipe.data.packing == "packed":
        raise UserError(
            "think_at is 'completion' and data.packing 'packed', by which the number of thoughts depends"
            " on the documents; expected 'document', or another rule to plan with, e.g. 'stride:100'"
        )
    step = step_of(recipe)
    rows, flops = Rows.of(config, step), step_flops(config, sizes, step)
    console.print(
        f"{recipe.name}: {sizes.all / 1e6:.1f} M parameters; batch {step.batch} x {step.length} tokens,"
        f" {rows.columns} columns of {config.num_slots} slots: {rows.packed} rows"
    )
    total = sum(flops.values())
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in flops.items())
    console.print(f"a step: {total / 1e12:.3g} TFLOP ({parts})")
    verdict = "fits" if fits(config, sizes, step, memory) else "does not fit"
    console.print(
        f"memory: {static_bytes(sizes, step) / GB:.2f} GB weights and states, peak"
        f" {peak_bytes(config, sizes, step) / GB:.2f} GB; with a GPU's own"
        f" {CONTEXT_BYTES / GB:.1f} GB and {GAPS - 1:.0%} gaps it {verdict} {size}"
    )
    _print_least_work(console, recipe, (config, sizes, step, memory), size)
    console.print(f"\nlargest batch per GPU of {size} (tried up to {BATCHES[-1]}), on so many GPUs:")
    runs = [(1, False), *((count, sharded) for count in (2, 4, 8) for sharded in (False, True))]
    heads = [f"{count}{' FSDP2' if sharded else ' DDP' * (count > 1)}" for count, sharded in runs]
    table = dict(ways(step))
    widest = max(map(len, table))
    console.print(" " * widest + "".join(f"{head:>9}" for head in heads))
    for name, way in table.items():
        cells = ""
        for count, sharded in runs:
            run = dataclasses.replace(way, processes=count, sharded=sharded)
            best = largest_batch(config, sizes, run, memory)
            # 4-bit weights are not sharded.
            cells += f"{'-' if sharded and way.quantized else best or 'no':>9}"
        console.print(f"{name:{widest}}{cells}")

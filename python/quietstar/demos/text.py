"""``quietstar demo text``: what thoughts do on real text, beside a control, on two CPU cores.

Real text without a download: the Python standard library's sources, some files held out by name. Stages,
each an ordinary recipe run in a folder of its own, so that a second call continues where one stopped:

1. ``base``: a byte-level BPE tokenizer and a small Llama, trained from random weights;
2. ``quiet-star``: that base, trained on with thoughts, on files it has not seen;
3. ``control``: the same base, the same steps and the same data in the same order, without thoughts;
4. all of them on held-out blocks: means, standard errors, deciles of token difficulty.

The result is stated as it is measured, gain or no gain.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quietstar.data.blocks import TokenBlocks
from quietstar.evaluation.perplexity import (
    Estimate,
    TokenLosses,
    deciles,
    estimate,
    token_losses,
)
from quietstar.evaluation.scores import token_scores
from quietstar.files import METRICS_FILE, read_json, write_json
from quietstar.recipes.recipe import Recipe, load_recipe
from quietstar.versions import package_versions

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM

# Steps and rows sized for at most 10 minutes on two cores (2 with --quick).
FULL = {"base_steps": 1200, "steps": 250, "blocks": 128}
QUICK = {"base_steps": 300, "steps": 50, "blocks": 64}
# Changed with what evaluate() returns, so that results of an older version are not shown as this one's.
EVALUATION = "2"
ARMS = {
    "base": "the base that both arms start from",
    "control": "trained on without thoughts",
    "silent": "trained on with thoughts, predicting without them",
    "mixed": "trained on with thoughts, predicting with them",
    "shuffled": "the same, but each thought was thought at another place with the same token",
}


def stage_recipes(output: Path, *, quick: bool) -> dict[str, Recipe]:
    """The recipe of each stage, by the name of its folder."""
    sizes = QUICK if quick else FULL
    tiny = load_recipe("tiny")
    base = tiny.changed(
        name="demo-text-base",
        data={"split": "first", "eval_split": None, "eval_blocks": 0},
        thoughts={"thought_kind": "none"},
        training={
            "max_steps": sizes["base_steps"],
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 50,
            "logging_steps": 100,
        },
    )
    quiet_star = tiny.changed(
        name="demo-text-quiet-star",
        model={"name": str(output / "base"), "config": None, "tokenizer": None, "base_only": True},
        # Files that are new to the base: on text that it knows by heart, sharpening every prediction
        # pays, and a mixing head that has learned this does harm on held-out files.
        data={"split": "further", "eval_split": None, "eval_blocks": 0},
        training={
            "max_steps": sizes["steps"],
            "learning_rate": 3e-4,
            "warmup_steps": 10,
            "logging_steps": 25,
            "save_steps": 25,
            "seed": 1,
        },
    )
    control = quiet_star.changed(name="demo-text-control", thoughts={"thought_kind": "none"})
    return {"base": base, "quiet-star": quiet_star, "control": control}


def run_demo(output: Path, *, quick: bool = False, fresh: bool = False) -> None:
    """Run the stages that are not done yet (all of them if ``fresh``), evaluate, print."""
    from rich.console import Console

    from quietstar.recipes.run import run_recipe

    console = Console(highlight=False)
    recipes = stage_recipes(output, quick=quick)
    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        steps = recipe.training["max_steps"]
        console.rule(f"{number} of 4: {name} ({steps} steps)", align="left")
        folder = output / name
        run_recipe(recipe, folder, overwrite=fresh and folder.is_dir())
    console.rule("4 of 4: held-out files", align="left")
    done = output / METRICS_FILE
    fingerprints = {name: recipe.fingerprint() for name, recipe in recipes.items()}
    fingerprints["evaluation"] = EVALUATION
    metrics = read_json(done) if done.is_file() and not fresh else {}
    page = output / "thoughts.html"
    if metrics.get("fingerprints") != fingerprints:
        sizes = QUICK if quick else FULL
        metrics = {
            "fingerprints": fingerprints,
            **evaluate(output, recipes["quiet-star"], blocks=sizes["blocks"]),
            "versions": package_versions(),
        }
        page.unlink(missing_ok=True)
        write_json(done, metrics)
    if not page.is_file():
        save_page(output, recipes["quiet-star"], page)
    show(console, metrics)
    console.print(f"\nmetrics: {done}\npage: {page}\ncheckpoint, after [b]import quietstar[/b]:")
    console.print(
        f'  transformers.AutoModelForCausalLM.from_pretrained("{output / "quiet-star"}")', soft_wrap=True
    )


def heldout_blocks(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, count: int) -> TokenBlocks:
    """``count`` rows spread evenly over all held-out files."""
    from quietstar.data.blocks import Blocks, read_blocks
    from quietstar.data.stdlib import load_stdlib

    size = recipe.data.block_size
    every, _ = read_blocks(
        lambda: load_stdlib("heldout"), tokenizer, Blocks(size), what="held-out files"
    )
    picked = np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)
    return TokenBlocks(every.tokens[picked], every.lengths[picked])


def evaluate(output: Path, recipe: Recipe, *, blocks: int) -> dict[str, Any]:
    """Losses of every arm on the same held-out blocks, and some thoughts, as plain data."""
    from transformers import AutoTokenizer

    from quietstar.modeling.model import QuietStarForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(output / "quiet-star")
    rows = heldout_blocks(tokenizer, recipe, blocks)
    losses: dict[str, TokenLosses] = {}
    model: QuietStarForCausalLM
    for name in ("base", "control", "quiet-star"):
        model = QuietStarForCausalLM.from_pretrained(output / name)
        losses[name] = token_losses(
            model, (rows[i] for i in range(len(rows))), description=f"evaluating {name}"
        )
    counted = losses["base"].counted
    quiet_star = losses["quiet-star"]
    shuffled = token_scores(
        model, torch.stack([rows[i]["input_ids"] for i in range(len(rows))]), thoughts="shuffled"
    )
    arms = {
        "base": losses["base"].base,
        "control": losses["control"].base,
        "silent": quiet_star.base,
        "mixed": quiet_star.mixed,
        "shuffled": shuffled.nll,
    }
    # Difficulty by the base that all arms started from, so that no arm defines its own hard tokens.
    decile = deciles(losses["base"].base, counted)
    gain = arms["control"] - arms["mixed"]
    return {
        "blocks": len(rows),
        "tokens": int(counted.sum()),
        "nll": {name: estimate(values, counted).to_dict() for name, values in arms.items()},
        "gain_over_control": estimate(gain, counted).to_dict(),
        "gain_over_silent": estimate(arms["silent"] - arms["mixed"], counted).to_dict(),
        "gain_over_shuffled": estimate(arms["shuffled"] - arms["mixed"], counted).to_dict(),
        "by_decile": [
            {
                "nll": {name: estimate(v, decile == d).to_dict() for name, v in arms.items()},
                "gain_over_control": estimate(gain, decile == d).to_dict(),
            }
            for d in range(10)
        ],
        "thoughts": thoughts_in_context(model, tokenizer, rows, quiet_star),
    }


def save_page(output: Path, recipe: Recipe, page: Path, *, count: int = 4) -> None:
    """The thoughts of the trained model in ``count`` held-out rows, to look at in a browser."""
    from transformers import AutoTokenizer

    from quietstar.inspect.page import About, write_page
    from quietstar.modeling.model import QuietStarForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(output / "quiet-star")
    rows = heldout_blocks(tokenizer, recipe, count)
    write_page(
        QuietStarForCausalLM.from_pretrained(output / "quiet-star"),
        tokenizer,
        [rows[i]["input_ids"].tolist() for i in range(len(rows))],
        page,
        about=About(
            title="Python source: what thinking gained",
            source="held-out files of the standard library",
            run_folder=output / "quiet-star",
        ),
    )


def thoughts_in_context(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenBlocks,
    losses: TokenLosses,
) -> list[dict[str, Any]]:
    """The most likely thoughts at six held-out places: three random, three with the largest gain."""
    gain = losses.base - losses.mixed
    width = gain.shape[1]
    places = list(np.random.default_rng(0).choice(gain.size, size=3, replace=False))
    places += list(np.argsort(-gain, axis=None, kind="stable")[:3])
    model.eval()
    found = []
    for number, place in enumerate(places):
        row, i = divmod(int(place), width)
        ids = rows[row]["input_ids"]
        with torch.no_grad():
            output = model(
                input_ids=ids[None], labels=ids[None], anchors=torch.tensor([[i]]), attention_mask=None
            )
        assert output.thought_ids is not None
        found.append(
            {
                "chosen": "at random" if number < 3 else "largest gain",
                "before": tokenizer.decode(ids[: i + 1])[-60:],
                "thought": tokenizer.decode(output.thought_ids[0, 0, 0]),
                "next": tokenizer.decode(ids[i + 1 : i + 2]),
                "base_nll": float(losses.base[row, i]),
                "mixed_nll": float(losses.mixed[row, i]),
            }
        )
    return found


def verdict(gain: Estimate) -> str:
    """One sentence on the gain over the control; more than two standard errors count as something."""
    if gain.error is None:
        return f"Gain over the control: {gain}; one block cannot tell whether that is noise."
    if gain.mean > 2 * gain.error:
        return f"Thoughts helped: {gain} nats per token better than the control."
    if gain.mean < -2 * gain.error:
        return f"Training with thoughts ended worse than the control: {gain} nats per token."
    return f"No gain: {gain} nats per token against the control, within two standard errors of 0."


def show(console: Console, metrics: dict[str, Any]) -> None:
    """Print the table, the thoughts and the verdict."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"nats per token on {metrics['tokens']} tokens of held-out files, by difficulty",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("tokens", no_wrap=True)
    for name in (*ARMS, "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    means = [_number(metrics["nll"][name]["mean"]) for name in ARMS]
    table.add_row("all", *means, _estimate(metrics["gain_over_control"]))
    errors = [_number(metrics["nll"][name]["standard_error"]) for name in ARMS]
    table.add_row("± over blocks", *errors, "", end_section=True)
    for d, part in enumerate(metrics["by_decile"]):
        label = f"tenth {d + 1}" + {0: ", easiest", 9: ", hardest"}.get(d, "")
        means = [_number(part["nll"][name]["mean"]) for name in ARMS]
        table.add_row(label, *means, _estimate(part["gain_over_control"]))
    console.print(table)
    for name, meaning in {**ARMS, "gain": "control - mixed"}.items():
        console.print(f"  {name}: {meaning}")
    console.print("\nthoughts (the most likely one at that place):")
    for thought in metrics["thoughts"]:
        console.print(
            f"  {thought['chosen']}: {thought['before']!r} -> thought {thought['thought']!r} "
            f"-> {thought['next']!r}; NLL {thought['base_nll']:.2f} without, "
            f"{thought['mixed_nll']:.2f} with",
            soft_wrap=True,
            markup=False,
        )
    gain = metrics["gain_over_control"]
    console.print(f"\n[b]{verdict(Estimate(gain['mean'], gain['standard_error']))}[/b]")
    silent, shuffled = (_estimate(metrics[f"gain_over_{name}"], 4) for name in ("silent", "shuffled"))
    console.print(
        f"Within the same model thinking is worth {silent}, and its own thoughts rather than those of "
        f"another place {shuffled}."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _estimate(value: dict[str, Any], digits: int = 3) -> str:
    error = value["standard_error"]
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{value['mean']:+.{digits}f}{spread}"

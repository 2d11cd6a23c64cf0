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

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quietstar.evaluation.perplexity import (
    Estimate,
    TokenLosses,
    by_decile,
    means,
    spread,
    token_losses,
    undisturbed,
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
        save_page(output, recipes["quiet-star"])
    show(console, metrics)
    console.print(f"\nmetrics: {done}\npage: {page}\ncheckpoint, after [b]import quietstar[/b]:")
    console.print(
        f'  transformers.AutoModelForCausalLM.from_pretrained("{output / "quiet-star"}")', soft_wrap=True
    )


def heldout_rows(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, count: int
) -> list[dict[str, torch.Tensor]]:
    """``count`` rows spread evenly over all held-out files."""
    from quietstar.data.blocks import Blocks, read_blocks
    from quietstar.data.stdlib import load_stdlib

    blocks = Blocks(recipe.data.block_size)
    every, _ = read_blocks(lambda: load_stdlib("heldout"), tokenizer, blocks, what="held-out files")
    picked = np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)
    return [every[int(number)] for number in picked]


def evaluate(output: Path, recipe: Recipe, *, blocks: int) -> dict[str, Any]:
    """Losses of every arm on the same held-out blocks, and some thoughts, as plain data."""
    from transformers import AutoTokenizer

    from quietstar.modeling.model import QuietStarForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(output / "quiet-star")
    rows = heldout_rows(tokenizer, recipe, blocks)
    losses: dict[str, TokenLosses] = {}
    model: QuietStarForCausalLM
    for name in ("base", "control", "quiet-star"):
        model = QuietStarForCausalLM.from_pretrained(output / name)
        losses[name] = token_losses(model, rows, description=f"evaluating {name}")
    counted = losses["base"].counted
    quiet_star = losses["quiet-star"]
    shuffled = token_scores(model, torch.stack([row["input_ids"] for row in rows]), thoughts="shuffled")
    arms = {
        "base": losses["base"].base,
        "control": losses["control"].base,
        "silent": quiet_star.base,
        "mixed": quiet_star.mixed,
        "shuffled": shuffled.nll,
    }
    gains = {
        f"gain_over_{name}": arms[name] - arms["mixed"] for name in ("control", "silent", "shuffled")
    }
    # Difficulty by the base that all arms started from, so that no arm defines its own hard tokens.
    of_arms = by_decile(arms, arms["base"], counted)
    of_gains = by_decile({"gain_over_control": gains["gain_over_control"]}, arms["base"], counted)
    return {
        "blocks": len(rows),
        "tokens": int(counted.sum()),
        "nll": means(arms, counted),
        **means(gains, counted),
        "by_decile": [{"nll": nll, **gain} for nll, gain in zip(of_arms, of_gains, strict=True)],
        "thoughts": thoughts_in_context(model, tokenizer, rows, quiet_star),
    }


def save_page(output: Path, recipe: Recipe, *, count: int = 4) -> None:
    """The thoughts of the trained model in ``count`` held-out rows, as ``thoughts.html``."""
    from transformers import AutoTokenizer

    from quietstar.inspect.page import write_run_page

    tokenizer = AutoTokenizer.from_pretrained(output / "quiet-star")
    write_run_page(
        output / "quiet-star",
        [row["input_ids"].tolist() for row in heldout_rows(tokenizer, recipe, count)],
        title="Python source: what thinking gained",
        source="held-out files of the standard library",
        tokenizer=tokenizer,
    )


def thoughts_in_context(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, torch.Tensor]],
    losses: TokenLosses,
) -> list[dict[str, Any]]:
    """The most likely thoughts at six held-out places: three random, three with the largest gain."""
    gain = losses.base - losses.mixed
    places = [
        ("at random", place) for place in np.random.default_rng(0).choice(gain.size, 3, replace=False)
    ]
    places += [("largest gain", place) for place in np.argsort(-gain, axis=None, kind="stable")[:3]]
    found = []
    for chosen, place in places:
        row, at = divmod(int(place), gain.shape[1])
        ids = rows[row]["input_ids"]
        with undisturbed(model):
            output = model(input_ids=ids[None], labels=ids[None], anchors=torch.tensor([[at]]))
        assert output.thought_ids is not None
        found.append(
            {
                "chosen": chosen,
                "before": tokenizer.decode(ids[: at + 1])[-60:],
                "thought": tokenizer.decode(output.thought_ids[0, 0, 0]),
                "next": tokenizer.decode(ids[at + 1 : at + 2]),
                "base_nll": float(losses.base[row, at]),
                "mixed_nll": float(losses.mixed[row, at]),
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
    rows = [("all", metrics["nll"], metrics["gain_over_control"])]
    for number, part in enumerate(metrics["by_decile"]):
        label = f"tenth {number + 1}" + {0: ", easiest", 9: ", hardest"}.get(number, "")
        rows.append((label, part["nll"], part["gain_over_control"]))
    for label, nll, gain in rows:
        table.add_row(label, *(f"{nll[name]['mean']:.3f}" for name in ARMS), spread(gain, "+.3f"))
        if label == "all":
            errors = [nll[name]["standard_error"] for name in ARMS]
            shown = ["" if error is None else f"{error:.3f}" for error in errors]
            table.add_row("± over blocks", *shown, "", end_section=True)
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
    silent, shuffled = (spread(metrics[f"gain_over_{name}"], "+.4f") for name in ("silent", "shuffled"))
    console.print(
        f"Within the same model thinking is worth {silent}, and its own thoughts rather than those of "
        f"another place {shuffled}."
    )

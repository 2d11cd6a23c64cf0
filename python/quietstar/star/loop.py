"""The loop: write, keep, rationalize, fine-tune the original model, test; and again.

In the output folder every iteration has one of its own: ``written.jsonl`` and ``hinted.jsonl`` (every
completion, with hints in the latter's prompts), ``kept.jsonl`` (the rationales; their prompts have no
hints, but for the share ``hints_left_in``),
``train.jsonl`` (what is learnt from), ``model`` (an ordinary run), ``tested.jsonl`` and, last,
``row.json``. A run that is killed goes on behind the last of these that is there, and ends as one that
was not.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from quietstar.checkpoints.load import load_checkpoint
from quietstar.data.sources import expand_files
from quietstar.data.tables import table_rows
from quietstar.errors import UserError
from quietstar.evaluation.tasks import digest
from quietstar.files import (
    INCOMPLETE,
    METRICS_FILE,
    RECIPE_FILE,
    RUN_FILE,
    check_writable,
    read_json,
    write_json,
)
from quietstar.recipes.build import build_model, build_tokenizer, check_files
from quietstar.recipes.recipe import Recipe, load_recipe
from quietstar.recipes.run import RunResult, run_recipe, training_arguments
from quietstar.recipes.run_folder import RunFolder, identity, open_run, start_run
from quietstar.recipes.star_section import StarSection
from quietstar.star.keeping import Kept, keep, keep_data, keep_rationalized, rows_to_learn
from quietstar.star.problems import Problem, Task, build_task
from quietstar.star.report import Row, accuracy_row, kept_row, save_report
from quietstar.star.writing import (
    Writer,
    Written,
    read_lines,
    records,
    shots_text,
    stop_text,
    write_lines,
)
from quietstar.training.options import check_options

logger = logging.getLogger("quietstar")

NO_EVALUATION = {"eval_strategy": "no"}
ROW_FILE, KEPT_FILE, TRAIN_FILE, MODEL_FOLDER = "row.json", "kept.jsonl", "train.jsonl", "model"
DATA_FILE = "data.json"


def run_star(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    show: Callable[[Row], None] | None = None,
) -> RunResult:
    """Bootstrap as the recipe's section ``star`` says; returns what ``metrics.json`` holds.

    Args:
        show: called with every row of the table when it is there, of earlier calls, too.

    Raises:
        UserError: for whatever is wrong with the recipe, the data or the folder, before anything is
            written; and where an iteration keeps nothing to learn from.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "WORLD_SIZE is above 1; expected one process: `quietstar star` is not run with torchrun"
        )
    if not recipe.star.is_given():
        raise UserError(
            f"recipe {recipe.name} has no section star, which `quietstar star` needs; expected one, or"
            " `quietstar train`"
        )
    path = Path(output)
    # The problems to be tested on are no text to evaluate on while it trains.
    unevaluated = recipe.changed(training=NO_EVALUATION)
    arguments = training_arguments(unevaluated, path, progress=progress)
    folder = open_run(path, recipe, overwrite=overwrite)
    if resume and not (path / RUN_FILE).is_file():
        raise UserError(f"output folder {path} holds no run to resume")
    if folder.metrics is not None and len(folder.metrics["rows"]) > recipe.star.iterations:
        logger.info("%s: this run is done", path)
        if show is not None:
            for row in folder.metrics["rows"]:
                show(row)
        return RunResult(path, folder.metrics, continued=True)
    check_writable(path)
    check_files(recipe.data)
    loop = _Loop(recipe, path, build_task(recipe), arguments.device, arguments.seed, progress)
    loop.check()
    continued = not folder.replaced and (path / RUN_FILE).is_file()
    if folder.replaced:
        _clear(path)
    _remove_scratch(path)
    loop.check_same_data()
    start_run(folder, recipe)
    write_json(path / DATA_FILE, loop.data())
    rows = []
    for iteration in range(recipe.star.iterations + 1):
        rows.append(loop.iteration(iteration))
        save_report(path, loop.settings(), rows)
        if show is not None:
            show(rows[-1])
    metrics = {**identity(recipe), "star": asdict(recipe.star), "rows": rows}
    write_json(path / METRICS_FILE, metrics)
    return RunResult(path, metrics, continued=continued)


class _Loop:
    """A run of :func:`run_star`: its folders, and one model in memory at a time."""

    def __init__(
        self, recipe: Recipe, output: Path, task: Task, device: Any, seed: int, progress: bool
    ) -> None:
        self.recipe, self.output, self.task, self.progress = recipe, output.resolve(), task, progress
        self.star, self.seed, self.device = recipe.star, seed, device
        self.replay = _read_replay(self.star)
        self._writer: tuple[int, Writer] | None = None

    def check(self) -> None:
        """Raise :class:`UserError` for settings, a model, or prompts that do not go together."""
        for number in {1, self.star.iterations}:
            model = self.folder(number) / MODEL_FOLDER
            check_options(training_arguments(self.training_recipe(number), model, progress=False), {})
        self._writer_of(0).check_lengths(self.recipe.data.block_size)

    def data(self) -> dict[str, Any]:
        """What tells whether the data are still those that a run began with."""
        problems = self.task.every_problem()
        content = [[asdict(problem) for problem in each] for each in (problems, self.task.test)]
        counts = (len(problems), len(self.task.test), len(self.replay))
        named = dict(zip(("problems", "held_out", "replayed"), counts, strict=True))
        return {**named, "digest": digest([content, self.replay])}

    def check_same_data(self) -> None:
        """Raise :class:`UserError` where a run that was begun would go on with other data: completions
        that are there already would be taken for those of other problems."""
        file, now = self.output / DATA_FILE, self.data()
        before = read_json(file) if file.is_file() else now
        if before != now:
            counts = "{problems} problems, {held_out} held out, {replayed} replayed rows"
            raise UserError(
                f"the data are not those that the run in {self.output} began with"
                f" ({counts.format_map(before)} then, {counts.format_map(now)} now); expected the same,"
                " another folder, or --overwrite"
            )

    def settings(self) -> StarSection:
        """The section as it is meant, for what its recipe leaves open."""
        star = self.star
        hint = self.task.hint if star.rationalize and star.learn_from == "rationales" else None
        return replace(star, answer=self.task.answer, hint=hint, stop=stop_text(star))

    def folder(self, iteration: int) -> Path:
        """Where an iteration leaves everything."""
        return self.output / f"iteration-{iteration:02d}"

    def iteration(self, number: int) -> Row:
        """The row of an iteration, which is run unless it is there; 0: the original model is tested."""
        folder, row = self.folder(number), {}
        if (folder / ROW_FILE).is_file():
            return read_json(folder / ROW_FILE)
        folder.mkdir(exist_ok=True)
        if number > 0:
            problems = self.task.problems(number)
            kept = self._kept(number, problems)
            row = {"steps": self.star.steps(number), **kept_row(problems, kept)}
            row |= self._fine_tune(number, kept)
        tested = self._write(number, self.task.test, folder / "tested.jsonl", bar="testing")
        row = {**accuracy_row(number, self.task.test, tested), **row}
        write_json(folder / ROW_FILE, row)
        return row

    def _kept(self, number: int, problems: Sequence[Problem]) -> list[Kept]:
        """What there is to learn from in an iteration; written by the model of the one before."""
        folder, star = self.folder(number), self.star
        if (folder / KEPT_FILE).is_file():
            return records(folder / KEPT_FILE, Kept)
        if star.learn_from == "answers":
            kept = keep_data(problems, number)
        else:
            samples = star.samples_per_problem
            written = self._write(
                number - 1, problems, folder / "written.jsonl", samples=samples, bar="solving"
            )
            kept, failed = keep(self.task, problems, written, number)
            if star.rationalize and failed:
                hinted = self._write(
                    number - 1, failed, folder / "hinted.jsonl", hinted=True, bar="rationalizing"
                )
                kept += keep_rationalized(
                    self.task, failed, hinted, number, star.hints_left_in, self.seed
                )
                written = [*written, *hinted]
            if not kept:
                raise UserError(self._nothing_kept(number, written))
        write_lines(folder / KEPT_FILE, [each.to_dict() for each in kept])
        return kept

    def _nothing_kept(self, number: int, written: Sequence[Sequence[Written]]) -> str:
        every = [each for samples in written for each in samples]
        ended = [each for each in every if each.ended]
        found = [each for each in ended if each.answer is not None]
        start = f"no problem was solved in iteration {number}: "
        if not ended:
            return (
                f"{start}none of {len(every)} completions ended within star.max_new_tokens,"
                f" {self.star.max_new_tokens}, e.g. {every[0].completion!r:.80}; set it higher, or set"
                " star.stop"
            )
        cut = f" ({len(every) - len(ended)} more did not end within star.max_new_tokens)"
        cut = cut if len(ended) < len(every) else ""
        if not found:
            return (
                f"{start}star.answer finds no answer in any of {len(ended)} completions, e.g."
                f" {ended[0].completion!r:.80}; expected another star.answer, or star.shots that show"
                f" how to answer{cut}"
            )
        return (
            f"{start}none of {len(found)} answers is right, e.g. {found[0].answer!r:.80}; expected a"
            f" model that solves some, easier problems, or star.shots{cut}"
        )

    def _fine_tune(self, number: int, kept: Sequence[Kept]) -> Row:
        """Train the model of an iteration; returns how many rows it learns from, by source, and how many
        were too long for that."""
        before = range(1, number) if self.star.older_rationales else ()
        older = [row for n in before for row in read_lines(self.folder(n) / KEPT_FILE)]
        rng = np.random.default_rng([self.seed, 6, number])
        plain = [each.to_dict() for each in kept]
        every = rows_to_learn(self.star, plain, older, self.replay, shots_text(self.star), rng)
        limit = self.recipe.data.block_size
        lengths = self._writer_of(number - 1).lengths(every)
        rows = [row for row, length in zip(every, lengths, strict=True) if length <= limit]
        if all(row["from"] == "replay" for row in rows):
            ours = [n for row, n in zip(every, lengths, strict=True) if row["from"] != "replay"]
            raise UserError(
                f"data.block_size is {limit} and none of the {len(ours)} completions to learn from in"
                f" iteration {number} fits in with its prompt, the shortest has {min(ours)} tokens;"
                " expected a larger one"
            )
        file, model = self.folder(number) / TRAIN_FILE, self.folder(number) / MODEL_FOLDER
        if not file.is_file():
            write_lines(file, rows)
        self._forget()
        recipe = self.training_recipe(number)
        _claim_moved(model, recipe)
        run_recipe(recipe, model, progress=self.progress, log_lines=False, model_seed=self.seed)
        sources = [row["from"] for row in rows]
        learnt = {source: sources.count(source) for source in dict.fromkeys(sources)}
        return {"learnt_from": learnt, "too_long": len(every) - len(rows)}

    def training_recipe(self, number: int) -> Recipe:
        """The fine-tuning of an iteration as an ordinary recipe."""
        star = self.star
        model: dict[str, Any] = {}
        if not star.restart and number > 1:
            model = {"name": str(self.folder(number - 1) / MODEL_FOLDER), "base_only": False}
            model |= {"tokenizer": None, "revision": None}
        nothing = ("name", "config_name", "revision", "preset", "eval_files", "eval_split")
        data: dict[str, Any] = {
            **dict.fromkeys(nothing),
            "files": [str(self.folder(number) / TRAIN_FILE)],
        }
        data |= {"prompt": "{prompt}", "completion": "{completion}", "text_column": None}
        data |= {"split": "train", "eval_blocks": 0, "max_train_blocks": None}
        return self.recipe.changed(
            name=f"{self.recipe.name}-{number}",
            model=model,
            data=data,
            training={
                "max_steps": star.steps(number),
                "seed": self.seed + number,
                **NO_EVALUATION,
            },
            star=None,
        )

    def _write(
        self, model: int, problems: Sequence[Problem], path: Path, *, bar: str, **how: Any
    ) -> list[list[Written]]:
        """What the model of an iteration writes."""
        said = f"iteration {path.parent.name.rpartition('-')[2]}: {bar}" if self.progress else ""
        return self._writer_of(model).write(problems, path, bar=said, **how)

    def _writer_of(self, iteration: int) -> Writer:
        if self._writer is None or self._writer[0] != iteration:
            self._forget()
            model: Any
            if iteration == 0:
                # What is drawn at random (of thoughts) is what each fine-tuning begins with, too.
                set_seed(self.seed)
                tokenizer = build_tokenizer(self.recipe.model)
                model = build_model(self.recipe, tokenizer).to(self.device)
            else:
                folder = self.folder(iteration) / MODEL_FOLDER
                model, tokenizer = load_checkpoint(str(folder), device=str(self.device))
            seed = self.seed * 1000 + iteration
            # As the trainer computes.
            types = {"bf16": torch.bfloat16, "fp16": torch.float16}
            autocast = next((types[key] for key in types if self.recipe.training.get(key)), None)
            self._writer = iteration, Writer(model, tokenizer, self.task, self.star, seed, autocast)
        return self._writer[1]

    def _forget(self) -> None:
        """Drop the model that is in memory."""
        self._writer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _clear(path: Path) -> None:
    """Remove what a run holds, so that at any time what is left of it is whole."""
    # First what says that it is done; then the last iteration, on which no other rests.
    (path / METRICS_FILE).unlink(missing_ok=True)
    (path / DATA_FILE).unlink(missing_ok=True)
    _remove_scratch(path)
    for old in sorted(path.glob("iteration-*"), reverse=True):
        os.replace(old, path / f"{INCOMPLETE}{old.name}")
        _remove_scratch(path)


def _remove_scratch(path: Path) -> None:
    """Remove iterations that were being removed."""
    for old in path.glob(f"{INCOMPLETE}iteration-*"):
        shutil.rmtree(old)


def _claim_moved(path: Path, recipe: Recipe) -> None:
    """Let a fine-tuning whose folder was moved, with all of the run, go on where it is now."""
    if not ((path / RUN_FILE).is_file() and (path / RECIPE_FILE).is_file()):
        return
    before = load_recipe(str(path / RECIPE_FILE))
    here = before.changed(data={"files": recipe.data.files}, model={"name": recipe.model.name})
    if before.fingerprint() != recipe.fingerprint() == here.fingerprint():
        start_run(RunFolder(path), recipe)


def _read_replay(star: StarSection) -> list[dict[str, Any]]:
    """The prompts and completions of ``star.replay_files``."""
    from quietstar.data.left_out import LeftOut

    rows, left_out = [], LeftOut()
    for path in expand_files(star.replay_files or []) if star.replay_files else ():
        for _, row in table_rows(path, ["prompt", "completion"], left_out, kind="column"):
            left_out.used()
            rows.append({key: str(row[key]) for key in ("prompt", "completion")})
    if star.replay_files:
        left_out.check(f"star.replay_files {star.replay_files}")
    return rows

"""A recipe, run: tokenizer, model, data, training, evaluation, checkpoint, metrics."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed

from quietstar.checkpoints.adapters import add_adapters
from quietstar.data.collator import collator_for
from quietstar.errors import UserError, blaming
from quietstar.evaluation.perplexity import summarize, token_losses
from quietstar.files import INCOMPLETE, METRICS_FILE, check_writable, write_json
from quietstar.recipes.build import build_data, build_model, build_tokenizer, check_files
from quietstar.recipes.disk import check_room, checkpoint_bytes
from quietstar.recipes.recipe import Recipe
from quietstar.recipes.run_folder import identity, open_run, start_run
from quietstar.training.arguments import QuietStarArguments
from quietstar.training.optional_packages import check_packages
from quietstar.training.options import check_options
from quietstar.training.trainer import QuietStarTrainer

logger = logging.getLogger("quietstar")


class _BarOnly(ProgressCallback):
    """transformers' progress bar without the log entries that it prints between."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""


@dataclass
class RunResult:
    """What a run left behind. ``metrics`` is the content of ``metrics.json``; ``continued`` says that
    some or all of it was done before this call.
    """

    output: Path
    metrics: dict[str, Any]
    continued: bool = False


def run_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    log_lines: bool = True,
    callbacks: list[TrainerCallback] | None = None,
    model_seed: int | None = None,
) -> RunResult:
    """Train as ``recipe`` says and leave everything in ``output``.

    A run of the same recipe that was interrupted continues from its last checkpoint; one that is
    done is not repeated. Everything that can be wrong with the recipe, the data or the folder
    raises :class:`UserError` (or ``ValueError`` from the model) before the folder is touched.
    ``log_lines=False`` leaves the progress bar alone on the screen; the log is in the checkpoints.
    ``model_seed`` is of the weights that are drawn at random, the training's seed where it is None.
    Under ``torchrun`` or ``accelerate launch`` every process calls this and the first one writes.
    """
    if recipe.star.is_given():
        raise UserError(
            f"recipe {recipe.name} has a section star, which `quietstar star` runs; expected none for a"
            " training"
        )
    arguments = training_arguments(recipe, Path(output), progress=progress)
    check_options(arguments, {})
    with arguments.main_process_first(desc="looking at the output folder"):
        folder = open_run(Path(output), recipe, resume=resume, overwrite=overwrite)
        if arguments.process_index == 0 and folder.metrics is None:
            check_writable(folder.path)
    if folder.metrics is not None:
        logger.info("%s: this run is done", folder.path)
        return RunResult(folder.path, folder.metrics, continued=True)

    check_files(recipe.data)
    set_seed(arguments.seed if model_seed is None else model_seed)
    tokenizer = build_tokenizer(recipe.model)
    model: Any = build_model(recipe, tokenizer)
    name, adapter = recipe.model.name, recipe.adapter
    if adapter.rank is not None:
        assert name is not None  # checked with the recipe
        model = add_adapters(
            model, name, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets
        )
    copied = model.config.reward == "information-gain"
    check_room(folder.path, arguments, *checkpoint_bytes(model, str(arguments.optim), copied))
    train_data, eval_data = build_data(recipe, tokenizer, progress=progress)

    # Not before every process has looked at the folder.
    arguments.distributed_state.wait_for_everyone()
    if arguments.process_index == 0:
        start_run(folder, recipe)
    trainer = QuietStarTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        data_collator=collator_for(tokenizer, recipe.data.padding_side),
        callbacks=callbacks,
    )
    if not log_lines:
        trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
        if progress:
            trainer.add_callback(_BarOnly())
    if folder.checkpoint is not None:
        logger.info("continuing from %s", folder.checkpoint)
    started = time.monotonic()
    trained = trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
    seconds = time.monotonic() - started

    metrics: dict[str, Any] = {
        **identity(recipe),
        "steps": trained.global_step,
        "seconds": round(seconds, 1),
        "train": trained.metrics,
    }
    if eval_data is not None:
        losses = token_losses(
            model,
            (eval_data[i] for i in range(len(eval_data))),
            batch_size=arguments.per_device_eval_batch_size,
            padding_side=recipe.data.padding_side,
            progress=progress,
        )
        metrics["evaluation"] = summarize(losses)
    _save_result(trainer, folder.path, metrics)
    return RunResult(folder.path, metrics, continued=folder.checkpoint is not None)


def _save_result(trainer: QuietStarTrainer, path: Path, metrics: dict[str, Any]) -> None:
    """Save the model and its tokenizer, then the metrics, whose presence says that all is saved."""
    scratch = path / f"{INCOMPLETE}model"
    first = trainer.args.process_index == 0
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(scratch))
    if first:
        # The configuration last: without it a folder is no model.
        for file in sorted(scratch.iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(file, path / file.name)
        scratch.rmdir()
        write_json(path / METRICS_FILE, metrics)
    trainer.accelerator.wait_for_everyone()


def training_arguments(recipe: Recipe, output: Path, *, progress: bool) -> TrainingArguments:
    """The training arguments of a recipe; raises :class:`UserError` if they do not fit."""
    defaults = {
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Without it transformers rejects bf16 on CPUs, those that compute it in hardware included.
        "use_cpu": not torch.accelerator.is_available(),
    }
    settings: dict[str, Any] = {**defaults, **recipe.training}
    if not progress:
        settings["disable_tqdm"] = True
    evaluates = settings.get("eval_strategy", "no") != "no"
    if evaluates and recipe.data.eval_blocks == 0:
        raise UserError(
            f"training.eval_strategy is {settings['eval_strategy']!r} but data.eval_blocks is 0; set "
            "the number of rows to evaluate on"
        )
    with blaming("training"):
        arguments = QuietStarArguments(output_dir=str(output), remove_unused_columns=False, **settings)
    with blaming(f"training.log_level is {arguments.log_level!r}"):
        arguments.get_process_log_level()
    check_packages(arguments)
    return arguments

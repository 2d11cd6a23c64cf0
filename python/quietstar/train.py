"""A recipe, run: tokenizer, model, data, training, evaluation, checkpoint, metrics."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.config import QuietStarConfig
from quietstar.corpora import Document
from quietstar.data import (
    Blocks,
    StreamedBlocks,
    TokenBlocks,
    collator_for,
    read_blocks,
)
from quietstar.errors import UserError
from quietstar.recipe import DataSection, ModelSection, Recipe
from quietstar.rundir import METRICS_FILE, open_run, start_run, write_json
from quietstar.sources import STDLIB, open_documents
from quietstar.versions import package_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerCallback,
        TrainingArguments,
    )

    from quietstar.modeling import QuietStarForCausalLM

logger = logging.getLogger("quietstar")


@dataclass
class RunResult:
    """What a run left behind. ``metrics`` is the content of ``metrics.json``."""

    output: Path
    metrics: dict[str, Any]


def run_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: list[TrainerCallback] | None = None,
) -> RunResult:
    """Train as ``recipe`` says and leave everything in ``output``.

    A run of the same recipe that was interrupted continues from its last checkpoint; one that is
    done is not repeated. Everything that can be wrong with the recipe, the data or the folder
    raises :class:`UserError` (or ``ValueError`` from the model) before the folder is touched.
    """
    folder = open_run(Path(output), recipe, resume=resume, overwrite=overwrite)
    if folder.metrics is not None:
        logger.info("%s: this run is done", folder.path)
        return RunResult(folder.path, folder.metrics)

    from transformers import set_seed

    from quietstar.trainer import QuietStarTrainer

    arguments = training_arguments(recipe, folder.path, progress=progress)
    set_seed(arguments.seed)
    tokenizer = build_tokenizer(recipe.model)
    model = build_model(recipe, tokenizer)
    train_data, eval_data = build_data(recipe, tokenizer, progress=progress)

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
    if folder.checkpoint is not None:
        logger.info("continuing from %s", folder.checkpoint)
    started = time.monotonic()
    trained = trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
    seconds = time.monotonic() - started

    metrics: dict[str, Any] = {
        "recipe": recipe.name,
        "fingerprint": recipe.fingerprint(),
        "steps": trained.global_step,
        "seconds": round(seconds, 1),
        "train": trained.metrics,
        "versions": package_versions(),
    }
    if eval_data is not None:
        from quietstar.evaluation.perplexity import summarize, token_losses

        losses = token_losses(
            model,
            (eval_data[i] for i in range(len(eval_data))),
            batch_size=arguments.per_device_eval_batch_size,
            padding_side=recipe.data.padding_side,
            progress=progress,
        )
        metrics["evaluation"] = summarize(losses)
    trainer.save_model(str(folder.path))
    tokenizer.save_pretrained(folder.path)
    write_json(folder.path / METRICS_FILE, metrics)
    return RunResult(folder.path, metrics)


def training_arguments(recipe: Recipe, output: Path, *, progress: bool) -> TrainingArguments:
    """``transformers.TrainingArguments`` of a recipe; raises :class:`UserError` if they do not fit."""
    import torch
    from transformers import TrainingArguments

    defaults = {"report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {**defaults, **recipe.training}
    if not progress:
        settings["disable_tqdm"] = True
    evaluates = settings.get("eval_strategy", "no") != "no"
    if evaluates and recipe.data.eval_blocks == 0:
        raise UserError(
            f"training.eval_strategy is {settings['eval_strategy']!r} but data.eval_blocks is 0; set "
            "the number of rows to evaluate on"
        )
    try:
        return TrainingArguments(output_dir=str(output), remove_unused_columns=False, **settings)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error


def build_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer that the model section names."""
    if section.tokenizer == STDLIB:
        from quietstar.corpora import stdlib_tokenizer

        return stdlib_tokenizer(section.vocab_size)
    from transformers import AutoTokenizer

    source = section.tokenizer or section.name
    assert source is not None  # checked with the recipe
    revision = section.revision if section.tokenizer is None else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {source}: {_first_line(error)}") from error
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> QuietStarForCausalLM:
    """The model of a recipe: a decoder with thoughts added, or a Quiet-STaR checkpoint continued.

    Adds the meta tokens to ``tokenizer`` if they are new.
    """
    from quietstar.modeling import QuietStarForCausalLM
    from quietstar.tokens import check_tokenizer

    section = recipe.model
    decoder = _random_decoder(section, tokenizer) if section.config else _load(section)
    thoughts = dict(recipe.thoughts)
    if isinstance(decoder, QuietStarForCausalLM):
        check_tokenizer(tokenizer, _thoughts_of(decoder))
    if isinstance(decoder, QuietStarForCausalLM) and not section.base_only:
        for key, value in thoughts.items():
            setattr(decoder.config, key, value)
        _thoughts_of(decoder).check_thoughts()
        return decoder
    if isinstance(decoder, QuietStarForCausalLM):
        decoder = decoder.base
    rows = int(decoder.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary has {rows}; they "
            "do not belong together (check model.tokenizer)"
        )
    return QuietStarForCausalLM.from_base(decoder, tokenizer, **thoughts)


def _thoughts_of(model: QuietStarForCausalLM) -> QuietStarConfig:
    config = model.config
    assert isinstance(config, QuietStarConfig)
    return config


def build_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True
) -> tuple[TokenBlocks | StreamedBlocks, TokenBlocks | None]:
    """Training rows and, if the recipe asks for them, evaluation rows (always in memory)."""
    data = recipe.data
    thoughts = QuietStarConfig(**recipe.thoughts)
    blocks = Blocks(data.block_size, data.packing, thoughts.talk_length + 2)
    seed = int(recipe.training.get("data_seed") or recipe.training.get("seed", 42))
    train_source = _source(data, data.name, data.files, data.split, seed)
    eval_data, skip = None, 0
    if data.eval_blocks:
        separate = data.eval_files is not None or data.eval_split is not None
        if data.eval_files is not None:
            eval_source = _source(data, None, data.eval_files, data.split, seed)
        elif data.eval_split is not None:
            if data.name is None:
                raise UserError(
                    "data.eval_split is set but the data are local files; set data.eval_files"
                )
            eval_source = _source(data, data.name, None, data.eval_split, seed)
        else:
            eval_source = train_source
        eval_data, used = read_blocks(
            eval_source,
            tokenizer,
            blocks,
            max_blocks=data.eval_blocks,
            what="the evaluation text",
            progress=progress,
        )
        skip = 0 if separate else used
    if data.streaming:
        return StreamedBlocks(
            train_source, tokenizer, blocks, skip=skip, max_blocks=data.max_train_blocks
        ), eval_data
    train_data, _ = read_blocks(
        train_source,
        tokenizer,
        blocks,
        max_blocks=data.max_train_blocks,
        skip=skip,
        what="the training text",
        progress=progress,
    )
    return train_data, eval_data


def _source(
    data: DataSection, name: str | None, files: list[str] | None, split: str, seed: int
) -> Callable[[], Iterator[Document]]:
    return open_documents(
        name=name,
        files=files,
        split=split,
        config_name=data.config_name,
        revision=data.revision,
        text_column=data.text_column,
        txt_documents=data.txt_documents,
        streaming=data.streaming,
        shuffle_buffer=data.shuffle_buffer,
        seed=seed,
    )


def _torch_dtype(name: str) -> Any:
    import torch

    return name if name == "auto" else getattr(torch, name)


def _load(section: ModelSection) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    assert section.name is not None  # checked with the recipe
    options: dict[str, Any] = {
        "dtype": _torch_dtype(section.dtype),
        "attn_implementation": section.attn_implementation,
        "revision": section.revision,
    }
    try:
        return AutoModelForCausalLM.from_pretrained(
            section.name, **{key: value for key, value in options.items() if value is not None}
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {section.name}: {_first_line(error)}") from error


def _random_decoder(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A decoder with random weights for ``model.config``, sized to the tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(section.config or {})
    model_type = fields.pop("model_type")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UserError(
            f"model.config.model_type is {model_type!r}, which this transformers does not know"
        ) from error
    for key in fields:
        # Configurations swallow unknown keys, and a misspelt size would go unnoticed.
        if not hasattr(known, key):
            names = [n for n in known.to_dict() if not n.startswith("_")]
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown key {key!r} in model.config ({model_type}){hint}")
    size = int(fields.get("vocab_size", len(tokenizer)))
    if size < len(tokenizer):
        raise UserError(
            f"model.config.vocab_size is {size} but the tokenizer has {len(tokenizer)} tokens; leave "
            "it out to take the tokenizer's"
        )
    ids = {
        "vocab_size": size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(model_type, **{**ids, **fields})
    options: dict[str, Any] = {}
    if section.dtype != "auto":
        options["dtype"] = _torch_dtype(section.dtype)
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    return AutoModelForCausalLM.from_config(config, **options)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def with_changes(recipe: Recipe, **sections: Any) -> Recipe:
    """A copy of a recipe with keys changed section by section, e.g. ``training={"max_steps": 9}``."""
    changes: dict[str, Any] = {}
    for name, values in sections.items():
        old = getattr(recipe, name)
        if isinstance(values, dict):
            changes[name] = (
                {**old, **values} if isinstance(old, dict) else dataclasses.replace(old, **values)
            )
        else:
            changes[name] = values
    return dataclasses.replace(recipe, **changes)


def main(recipe: Recipe, output: Path, args: argparse.Namespace) -> int:
    """``quietstar train``: run, then say what came out and where it lies."""
    from rich.console import Console

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = run_recipe(
        recipe,
        output,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    console = Console(soft_wrap=True, highlight=False)
    metrics = result.metrics
    console.print(f"{metrics['steps']} steps of recipe {metrics['recipe']}: {result.output}")
    if "evaluation" in metrics:
        evaluation = metrics["evaluation"]
        for key, words in (
            ("base_nll", "NLL without thoughts"),
            ("mixed_nll", "NLL with thoughts"),
            ("gain", "gain"),
        ):
            error = evaluation[key]["standard_error"]
            spread = "" if error is None else f" ± {error:.4f}"
            console.print(f"  {words}: {evaluation[key]['mean']:.4f}{spread} nats per token")
    return 0

"""What several commands have in common: arguments, their checks, and opening a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeAlias

from quietstar.cli.parser import Parser
from quietstar.errors import UserError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

INTERRUPTED = 130  # exit status


def add_model(command: argparse.ArgumentParser) -> None:
    """Which model to open, with which tokenizer, and where."""
    command.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a run or checkpoint, GGUF file, or hub name",
    )
    command.add_argument("--tokenizer", metavar="T", help="another tokenizer than the model's own")
    command.add_argument("--device", metavar="D", help="cpu, cuda, ... (default: cuda if it is there)")


def add_recipe(command: argparse.ArgumentParser) -> None:
    """Which recipe, and what is changed in it."""
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    command.add_argument(
        "settings",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],  # without one argparse asks for it
        help="changes to the recipe, e.g. training.learning_rate=1e-4",
    )


def add_run_folder(command: argparse.ArgumentParser) -> None:
    """Where a run goes, and how it is continued."""
    command.add_argument(
        "--output", metavar="DIR", type=Path, help="output folder (default: quietstar-runs/NAME)"
    )
    how = command.add_mutually_exclusive_group()
    how.add_argument(
        "--resume",
        action="store_true",
        help="insist on continuing a run that is there (an unfinished run continues anyway)",
    )
    how.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def check_at_least(args: argparse.Namespace, **minima: int) -> None:
    """Raise :class:`UserError` for the first option that was given and is below its minimum."""
    for name, minimum in minima.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {value}; expected a whole number >= {minimum}")


def open_model(args: argparse.Namespace, plain: bool = False) -> tuple[Any, Any]:
    """The model and the tokenizer that :func:`add_model`'s arguments name; transformers stays silent.

    Args:
        plain: take a decoder without thoughts, too.
    """
    from transformers.utils import logging as transformers_logging

    from quietstar.checkpoints.load import load_checkpoint

    transformers_logging.set_verbosity_error()
    return load_checkpoint(args.model, device=args.device, tokenizer=args.tokenizer, plain=plain)

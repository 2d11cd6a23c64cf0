"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

INTERRUPTED = 130  # exit status


def add_model(command: argparse.ArgumentParser) -> None:
    """Which model to open, with which tokenizer, and where."""
    command.add_argument(
        "model", metavar="MODEL", help="folder of a run or checkpoint, or its name on the hub"
    )
    command.add_argument("--tokenizer", metavar="T", help="another tokenizer than the model's own")
    command.add_argument("--device", metavar="D", help="cpu, cuda, ... (default: cuda if it is there)")

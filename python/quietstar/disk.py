"""Before a run: is there room for its checkpoints, and may they be written where they should go?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from quietstar.errors import UserError
from quietstar.paths import is_folder

if TYPE_CHECKING:
    from transformers import TrainingArguments

GB = 10**9


def check_writable(folder: Path) -> None:
    """Raise :class:`UserError` unless files can be made in ``folder``, which may not be there yet.

    What this makes it removes again.
    """
    with _removing_what_is_made(folder, f"output folder {folder}", "; choose another folder"):
        probe = folder / f".quietstar-probe-{os.getpid()}"
        try:
            probe.write_bytes(b"?")
        finally:
            probe.unlink(missing_ok=True)


def check_writable_file(path: Path) -> None:
    """Raise :class:`UserError` unless the file, which may not be there yet, can be written."""
    if is_folder(path):
        raise UserError(f"--output {path} is a folder; expected a file name")
    with _removing_what_is_made(path.parent, f"--output {path}", ""):
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.unlink()


@contextmanager
def _removing_what_is_made(folder: Path, what: str, advice: str) -> Iterator[None]:
    """Within, ``folder`` is there; what goes wrong is said of ``what``."""
    made: list[Path] = []
    try:
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{what} cannot be written to: {why}{advice}") from error
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()


def checkpoint_bytes(model: nn.Module, optim: str, averaged_copy: bool = False) -> tuple[int, int]:
    """What the weights alone take on the disk, and what a checkpoint does.

    Of a model with adapters only what is trained is written.
    """
    every = {id(p): p for p in model.parameters()}.values()
    trained = [p for p in every if p.requires_grad]
    written = trained if hasattr(model, "peft_config") else list(every)
    weights = sum(p.numel() * p.element_size() for p in written)
    size = sum(p.numel() for p in trained)
    item = max((p.element_size() for p in trained), default=0)
    if "8bit" in optim:
        item = 1
    states = 0 if optim == "sgd" else 1 if optim in ("adafactor", "adagrad", "rmsprop") else 2
    return weights, weights + states * item * size + (4 * size if averaged_copy else 0)


def check_room(folder: Path, args: TrainingArguments, weights: int, checkpoint: int) -> None:
    """Raise :class:`UserError` if the disk cannot hold what the run is going to write.

    Args:
        folder: of the run; an existing parent tells the disk. What the run has there already counts as
            written.
        weights, checkpoint: bytes of the final model and of one checkpoint.
    """
    kept = _kept_at_once(args)
    needed = kept * checkpoint + weights
    if folder.is_dir():
        needed -= sum(_size(p) for p in folder.glob("checkpoint-*"))
    place = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed <= free:
        return
    limit = args.save_total_limit
    raise UserError(
        f"output folder {folder}: {needed / GB:.3g} GB are needed ({kept} checkpoints of"
        f" {checkpoint / GB:.3g} GB at once and the final model) and {free / GB:.3g} GB are free; make"
        f" room, choose another folder, or lower training.save_total_limit (now {limit})"
    )


def _kept_at_once(args: TrainingArguments) -> int:
    """The most checkpoints that are there at a time: those kept, and the one being written."""
    if args.save_strategy == "no":
        return 0
    planned = None
    if args.max_steps > 0 and args.save_strategy == "steps":
        every = (
            args.save_steps if args.save_steps >= 1 else max(1, int(args.save_steps * args.max_steps))
        )
        planned = max(1, -(-args.max_steps // int(every)))
    if args.save_total_limit is None or args.save_total_limit < 1:
        return 2 if planned is None else planned
    return args.save_total_limit + 1 if planned is None else min(planned, args.save_total_limit + 1)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

"""Before a run: is there room for its checkpoints?"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from transformers import TrainingArguments

from quietstar.errors import UserError

GB = 10**9


def checkpoint_bytes(model: nn.Module, optim: str, averaged_copy: bool = False) -> tuple[int, int]:
    """Bytes on the disk of the weights alone, and of a checkpoint.

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
    """The maximum number of checkpoints on the disk at a time: those kept, and the one being written."""
    if args.save_strategy == "no":
        return 0
    limit = args.save_total_limit or 0
    bounds = [limit + 1] if limit >= 1 else []
    if args.max_steps > 0 and args.save_strategy == "steps":
        share = args.save_steps < 1  # of all steps
        every = max(1, int(args.save_steps * args.max_steps)) if share else int(args.save_steps)
        bounds.append(max(1, -(-args.max_steps // every)))
    return min(bounds, default=2)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

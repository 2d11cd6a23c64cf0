"""Checkpoint folders: made whole, named, rotated, swept up; see :mod:`quietstar.checkpoints.save`."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from quietstar.errors import UserError
from quietstar.files import INCOMPLETE

# What transformers or torch would unpickle, if it were there.
_PICKLES = re.compile(
    r"(pytorch_model|adapter_model).*\.bin|(optimizer|scheduler|scaler)\.(pt|bin)|rng_.*\.pth"
)


def refuse_pickles(folder: Path) -> None:
    """Raise :class:`UserError` if a checkpoint holds a file that would have to be unpickled."""
    for entry in folder.iterdir():
        if _PICKLES.fullmatch(entry.name):
            raise UserError(
                f"checkpoint {folder} holds {entry.name}, which would have to be unpickled; expected"
                " safetensors, as quietstar writes them"
            )


def publish(scratch: Path, final: Path) -> None:
    """Make a finished folder appear under its name, whole and on the disk."""
    for path in [*scratch.rglob("*"), scratch]:
        _flush(path)
    if final.exists():
        replaced = final.with_name(f"{INCOMPLETE}replaced-{final.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    scratch.rename(final)
    _flush(final.parent)
    sweep(final.parent)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``, but neither the newest nor the best."""
    if not limit or limit < 1:
        return
    steps = {path: path.name.partition("-")[2] for path in run.glob("checkpoint-*")}
    ordered = sorted((p for p in steps if steps[p].isdecimal()), key=lambda p: int(steps[p]))
    spare = [path for path in ordered[:-1] if best is None or path != Path(best)]
    for path in spare[: max(0, len(ordered) - limit)]:
        doomed = path.with_name(f"{INCOMPLETE}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove what interrupted saves have left."""
    for path in run.glob(f"{INCOMPLETE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def empty_folder(path: Path) -> None:
    """Make an empty folder, in place of one that is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

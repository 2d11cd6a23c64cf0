"""The output folder of a run: whose it is, how far it came, and how it is continued.

A run writes ``run.json`` (the recipe's fingerprint) and ``recipe.yaml`` (the resolved recipe)
before it trains, ``checkpoint-N`` while it trains, and the model, the tokenizer and
``metrics.json`` (last) when it is done. Whatever it is at may be killed: each of these is there whole
or not at all, and what is called ``incomplete-`` is nothing. A folder that holds anything else is never
written to.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar.errors import UserError
from quietstar.files import (
    METRICS_FILE,
    RECIPE_FILE,
    RUN_FILE,
    is_file,
    is_folder,
    last_checkpoint,
    read_json,
    scratch_path,
    write_json,
    write_whole,
)
from quietstar.recipes.recipe import Recipe, load_recipe
from quietstar.values import leaves
from quietstar.versions import package_versions


@dataclass
class RunFolder:
    """An output folder that belongs to this run.

    ``checkpoint`` is the last complete one, or None; ``metrics`` those of a run that is done. With
    ``replaced`` it holds a run that makes place for this one when this one starts.
    """

    path: Path
    checkpoint: Path | None = None
    metrics: dict[str, Any] | None = None
    replaced: bool = False


def open_run(path: Path, recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Look at an output folder without changing it.

    The same recipe continues where it stopped. Raises :class:`UserError` if the folder belongs to
    another run or holds other files, and with ``resume`` if there is nothing to continue.
    """
    if not is_folder(path) and is_file(path):
        raise UserError(f"output folder {path} is a file; expected a folder or a new name")
    # Killed before its first file was whole, a run leaves a scratch file and no more.
    scratch = scratch_path(path / RUN_FILE).name
    has_files = is_folder(path) and any(entry.name != scratch for entry in path.iterdir())
    if has_files and not (path / RUN_FILE).is_file():
        raise UserError(
            f"output folder {path} holds files but no {RUN_FILE}, so it belongs to something else; "
            "choose another folder"
        )
    if has_files and overwrite:
        _check_kind(path, recipe)
        return RunFolder(path, replaced=True)
    if not has_files:
        if resume:
            raise UserError(f"output folder {path} holds no run to resume")
        return RunFolder(path)
    started = read_json(path / RUN_FILE)
    if started.get("fingerprint") != recipe.fingerprint():
        raise UserError(
            f"output folder {path} belongs to another run ({_difference(path, recipe)}); choose "
            "another folder, or start anew with --overwrite (--fresh for the demo)"
        )
    metrics = read_json(path / METRICS_FILE) if (path / METRICS_FILE).is_file() else None
    checkpoint = last_checkpoint(path)
    if resume and metrics is None and checkpoint is None:
        raise UserError(f"output folder {path} holds no checkpoint to resume from")
    return RunFolder(path, checkpoint, metrics)


def start_run(folder: RunFolder, recipe: Recipe) -> None:
    """Claim the folder for this recipe."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if folder.replaced:
        _clear(folder.path)
    # This file first: a folder without it belongs to something else.
    write_json(folder.path / RUN_FILE, identity(recipe))
    write_whole(folder.path / RECIPE_FILE, recipe.to_yaml())


def identity(recipe: Recipe) -> dict[str, Any]:
    """Which recipe a run is of, and what it runs on."""
    versions = package_versions()
    return {"recipe": recipe.name, "fingerprint": recipe.fingerprint(), "versions": versions}


def _clear(path: Path) -> None:
    """Remove a run's results; its model files and run.json are overwritten by the new run."""
    for entry in path.iterdir():
        if re.fullmatch(r"checkpoint-\d+", entry.name) and entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name in (RECIPE_FILE, METRICS_FILE):
            entry.unlink()


def _check_kind(path: Path, recipe: Recipe) -> None:
    """Raise :class:`UserError` for a folder of the other command, whose files none of this run's would
    take the place of."""
    kinds = ("`quietstar train`", "`quietstar star`")
    try:
        there = load_recipe(str(path / RECIPE_FILE)).star.is_given()
    except UserError:  # of another version, or damaged
        return
    if there != recipe.star.is_given():
        raise UserError(
            f"output folder {path} belongs to a run of {kinds[there]}, whose files would stay beside"
            f" those of {kinds[not there]}; choose another folder"
        )


def _difference(path: Path, recipe: Recipe) -> str:
    """The first setting in which the folder's recipe differs from this one."""
    try:
        before = dict(leaves(load_recipe(str(path / RECIPE_FILE)).relevant_settings()))
    except UserError:
        return "its recipe cannot be read"
    now = dict(leaves(recipe.relevant_settings()))
    for key in now | before:
        if now.get(key) != before.get(key):
            return f"{key} is {before.get(key)!r} there and {now.get(key)!r} here"
    return "its recipe differs"

"""Files: paths that users give, text and JSON written atomically, the names in a run's folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quietstar.errors import UserError

INCOMPLETE = "incomplete-"
RUN_FILE, RECIPE_FILE, METRICS_FILE = "run.json", "recipe.yaml", "metrics.json"


# Unlike pathlib's, these are False for what cannot be a path at all: too long, or with a null character.
is_file, is_folder = os.path.isfile, os.path.isdir


def read_text(path: Path, kind: str) -> str:
    """The text of a file; ``kind`` says what it is in the :class:`UserError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{kind} {path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"{kind} {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{kind} {str(path)!r} is not a path") from None


def last_checkpoint(path: Path) -> Path | None:
    """The checkpoint with the highest step among those that are complete."""
    found = []
    for entry in path.iterdir() if path.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
        # The Trainer writes trainer_state.json last.
        if match and (entry / "trainer_state.json").is_file():
            found.append((int(match.group(1)), entry))
    return max(found)[1] if found else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises :class:`UserError` if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def scratch_path(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_suffix(path.suffix + ".new")


def write_whole(path: Path, text: str) -> None:
    """Write text so that a reader finds the old file or the new one, never a part."""
    scratch_path(path).write_text(text, encoding="utf-8")
    os.replace(scratch_path(path), path)


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
    """Within, ``folder`` exists; errors name ``what``."""
    made: list[Path] = []
    try:
        made = [p for p in (folder, *folder.parents) if p.name != ".." and not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{what} cannot be written to: {why}{advice}") from error
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()

"""Questions about paths that a user has written, whatever they have written."""

from __future__ import annotations

from pathlib import Path


def is_file(path: Path) -> bool:
    """Whether there is such a file; False also for what cannot be a path at all."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; False also for what cannot be a path at all."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False

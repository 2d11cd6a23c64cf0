"""Questions about paths that a user has written, whatever they have written."""

from __future__ import annotations

from pathlib import Path

from quietstar.errors import UserError


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


def read_text(path: Path, kind: str) -> str:
    """The text of a file; ``kind`` names it in the :class:`UserError` for what is no text file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{kind} {path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"{kind} {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{kind} {str(path)!r} is no path") from None

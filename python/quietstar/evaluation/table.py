"""Text tables of ``quietstar eval``: what all tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Predictions as a table's columns call them.
COLUMNS = {
    "base": "no thought",
    "mixed": "with thoughts",
    "gain": "difference",
    "thought": "thought alone",
    "shuffled": "shuffled",
    "pause": "pause tokens",
}


def interval(found: Mapping[str, Any]) -> str:
    """The plain data of a :class:`~quietstar.evaluation.statistics.Interval` as ``mean [low, high]``."""
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title above columns of the width they need; the first is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join([title, *lines])

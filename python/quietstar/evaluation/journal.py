"""Finished items on disk, so that an interrupted evaluation continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quietstar.evaluation.tasks import digest


class Journal:
    """A jsonl file of records beside the output, one line per finished item.

    A line is found again by the digest of the model, the task and the item itself: another model or
    setting finds nothing, and a larger ``--limit`` finds what is there. Each process of a run
    appends to a file of its own and reads those of all.
    """

    def __init__(self, output: Path, process: int = 0):
        self._output = output
        self.path = output.with_name(f"{output.name}.items{process or ''}.jsonl")
        self.found = dict(self._read())

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        files = [self._output.with_name(f"{self._output.name}.items.jsonl")]
        start = f"{self._output.name}.items"
        if self._output.parent.is_dir():
            numbered = (p for p in self._output.parent.iterdir() if p.name.startswith(start))
            files += sorted(p for p in numbered if p.name[len(start) : -len(".jsonl")].isdigit())
        for path in files:
            if path.is_file():
                for line in path.read_text(encoding="utf-8").splitlines():
                    try:
                        entry = json.loads(line)
                        yield entry["key"], entry["record"]
                    except (json.JSONDecodeError, KeyError, TypeError):
                        continue  # the line that an interrupted run did not finish

    @staticmethod
    def key(run: str, item: Any) -> str:
        """``run``: digest of the model and the task; ``item``: plain data."""
        return digest([run, item])[:32]

    def add(self, entries: list[tuple[str, dict[str, Any]]]) -> None:
        """Append records and have them on disk before returning."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")  # what was cut off must not swallow the next line
            for key, record in entries:
                file.write(json.dumps({"key": key, "record": record}).encode() + b"\n")
                self.found[key] = record

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"

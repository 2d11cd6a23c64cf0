"""``report_to: csv``: what training logs as a table, ``log.csv`` in the output folder."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from quietstar.files import write_whole

logger = logging.getLogger("quietstar")

FILE = "log.csv"
FIRST = ("step", "epoch")  # columns; the others follow in the order in which they are first logged


class CsvLog(TrainerCallback):
    """A row per entry of the log; what an entry does not have is left empty.

    A run that continues keeps the rows up to its checkpoint; one that starts anew starts a new file. At
    an entry with new columns, such as the first evaluation's, the file is written again. Where the disk
    is full training goes on, with a warning, and the rows are written when there is room.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] | None = None  # None: not looked at the file
        self._columns = list(FIRST)
        self._is_whole = False  # whether the file holds all rows and columns

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            rows = read(path_of(args)) if state.global_step else []
            self._begin(row for row in rows if int(row["step"]) <= state.global_step)
            self._write(path_of(args))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a row."""
        if not state.is_world_process_zero or not logs:
            return
        if self._rows is None:  # an evaluation without a training
            self._begin(read(path_of(args)))
        self._add({"step": state.global_step, **logs})
        self._write(path_of(args))

    def _begin(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows, self._columns, self._is_whole = [], list(FIRST), False
        for row in rows:
            self._add({name: value for name, value in row.items() if value != ""})

    def _add(self, row: dict[str, Any]) -> None:
        assert self._rows is not None
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        self._columns += new
        self._is_whole &= not new

    def _write(self, path: Path) -> None:
        """The last row, or everything where the file does not hold what was before."""
        assert self._rows is not None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._is_whole:
                with path.open("a", encoding="utf-8", newline="") as file:
                    file.write(self._text(self._rows[-1:]))
            else:
                names = {name: name for name in self._columns}
                write_whole(path, self._text([names, *self._rows]))
            self._is_whole = True
        except OSError as error:
            self._is_whole = False
            logger.warning("%s cannot be written: %s; it will be tried again", path, error.strerror)

    def _text(self, rows: list[dict[str, Any]]) -> str:
        lines = io.StringIO(newline="")
        csv.DictWriter(lines, self._columns, restval="", lineterminator="\n").writerows(rows)
        return lines.getvalue()


def path_of(args: TrainingArguments) -> Path:
    """Where the table of a training lies."""
    return Path(str(args.output_dir)) / FILE


def read(path: Path) -> list[dict[str, str]]:
    """The whole rows of such a file, as text; none where it is not there or is another table."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off in the middle
    table = csv.DictReader(io.StringIO(whole))
    if tuple(table.fieldnames or ())[: len(FIRST)] != FIRST:
        return []
    # A row with too few values has None among them, one with too many the key None.
    sound = (row for row in table if None not in row and None not in row.values())
    return [row for row in sound if row["step"].isdecimal()]

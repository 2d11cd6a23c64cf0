"""Streams that know where they are: a position can be saved and continued from, exactly and cheaply.

A position is taken before each batch of documents that is tokenized, so continuing costs at most one
such batch beyond what is wanted. Where the source itself can tell and take up its place (a data set of
the hub, :class:`HubStream`), nothing before it is read again; elsewhere (local files) the documents
before it are read but not tokenized.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from quietstar.data.left_out import LeftOut
from quietstar.data.readers import Fields, RowReader
from quietstar.data.stdlib import Document
from quietstar.data.tables import ROWS_TO_TELL, check_columns, missing_column
from quietstar.errors import blaming

Position = dict[str, Any]


class HubStream:
    """Documents of a streamed data set, shuffled in a buffer whose content belongs to the position.

    Args:
        rows: a ``datasets.IterableDataset`` (its shards shuffled already, if they should be).
        reader: makes a document of a row.
        buffer_size: rows held for shuffling; 0: in the order of the data set.
        left_out: counts the rows that cannot be used.
    """

    def __init__(
        self,
        rows: Any,
        name: str,
        reader: RowReader,
        buffer_size: int,
        seed: int,
        left_out: LeftOut,
    ) -> None:
        self._rows, self._name, self._reader, self._left_out = rows, name, reader, left_out
        self._size = buffer_size
        self._random = random.Random(seed)
        self._buffer: list[tuple[int, Fields]] = []
        self._number = 0
        self._ended = False
        self._upstream: Iterator[Any] | None = None

    def __iter__(self) -> HubStream:
        return self

    def __next__(self) -> Document:
        while not self._ended and len(self._buffer) <= self._size:
            self._read()
        if not self._buffer:
            raise StopIteration
        # One of those held, the last read included, leaves in its turn.
        place = self._random.randrange(len(self._buffer)) if self._size else 0
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        number, fields = self._buffer.pop()
        return Document(f"{self._name}:{number}", *fields)

    def _read(self) -> None:
        if self._upstream is None:
            self._upstream = iter(self._rows)
        with blaming(f"data set {self._name} cannot be read after {self._number} rows"):
            row = next(self._upstream, None)
        if row is None:
            self._ended = True
            self._left_out.check(f"data set {self._name}")
            return
        where, wanted = f"data set {self._name}, row {self._number}", self._reader.columns or []
        if self._left_out.nothing_used and self._left_out.count >= ROWS_TO_TELL:
            check_columns(row, wanted, where, self._reader.kind)
        missing = next((column for column in wanted if column not in row), None)
        if missing is None:
            fields = self._reader.read(row, where, self._left_out)
            if fields is not None:
                self._buffer.append((self._number, fields))
        else:
            self._left_out.add(where, missing_column(row, missing, self._reader.kind))
        self._number += 1

    def position(self) -> Position:
        """The stream's position, as plain data."""
        version, words, gauss = self._random.getstate()
        return {
            "rows": self._rows.state_dict() if self._upstream is not None else None,
            "number": self._number,
            "buffer": [[number, *fields] for number, fields in self._buffer],
            "random": [version, list(words), gauss],
        }

    def seek(self, position: Position) -> None:
        """Continue from a position; to be called before anything is read."""
        if position["rows"] is not None:
            self._rows.load_state_dict(position["rows"])
        self._number = position["number"]
        self._buffer = [(number, tuple(fields)) for number, *fields in position["buffer"]]
        if self._buffer or self._number:
            self._left_out.used()  # by the run that is continued
        version, words, gauss = position["random"]
        self._random.setstate((version, tuple(words), gauss))


def batches(
    opened: Any, skip: int, size: int, start: Position
) -> Iterator[tuple[Position, list[Document]]]:
    """Batches of ``size`` documents from a position to the end of a source, each with its own position.

    An empty batch comes last. ``skip`` documents at the front are left out.
    """
    source, documents = opened, start["documents"]
    if start["source"] is not None:
        opened.seek(start["source"])
    else:
        source = islice(opened, skip + documents, None)
    batch: list[Document] | None = None
    while batch is None or batch:
        # Before the first batch the documents to be skipped have not been read yet.
        told = documents > 0 and hasattr(opened, "position")
        position = {"documents": documents, "source": opened.position() if told else None}
        batch = list(islice(source, size))
        documents += len(batch)
        yield position, batch

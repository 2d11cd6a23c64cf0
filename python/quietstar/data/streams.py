"""Streams that know where they are: a position can be saved and continued from, exactly and cheaply.

A position is taken before each batch of documents that is tokenized, so continuing costs at most one
such batch beyond what is wanted. Where the source itself can tell and take up its place (a data set of
the hub, :class:`HubStream`), nothing before it is read again; elsewhere (local files) the documents
before it are read but not tokenized.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from quietstar.data.left_out import LeftOut
from quietstar.data.stdlib import Document
from quietstar.errors import UserError

Position = dict[str, Any]
# Positions that are remembered: more than a loader can be ahead of the training.
REMEMBERED = 256


class HubStream:
    """Documents of a streamed data set, shuffled in a buffer whose content belongs to the position.

    Args:
        rows: a ``datasets.IterableDataset`` (its shards shuffled already, if they should be).
        text_of: the text of a row and its number; None: the row cannot be used.
        buffer_size: rows held for shuffling; 0: in the order of the data set.
        left_out: counts the rows that cannot be used.
    """

    def __init__(
        self,
        rows: Any,
        name: str,
        text_of: Callable[[Any, int], str | None],
        buffer_size: int,
        seed: int,
        left_out: LeftOut,
    ) -> None:
        self._rows, self._name, self._text_of, self._left_out = rows, name, text_of, left_out
        self._size = buffer_size
        self._random = random.Random(seed)
        self._buffer: list[tuple[int, str]] = []
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
        number, text = self._buffer.pop()
        return Document(f"{self._name}:{number}", text)

    def _read(self) -> None:
        if self._upstream is None:
            self._upstream = iter(self._rows)
        try:
            row = next(self._upstream, None)
        except Exception as error:  # `datasets` raises its own, HTTP, OS and value errors alike
            detail = " ".join(str(error).split())
            raise UserError(
                f"data set {self._name} cannot be read after {self._number} rows: {detail[:400]}"
            ) from error
        if row is None:
            self._ended = True
            self._left_out.check(f"data set {self._name}")
            return
        text = self._text_of(row, self._number)
        if text is not None:
            self._buffer.append((self._number, text))
        self._number += 1

    def position(self) -> Position:
        """Where the stream is, as plain data."""
        version, words, gauss = self._random.getstate()
        return {
            "rows": self._rows.state_dict() if self._upstream is not None else None,
            "number": self._number,
            "buffer": [list(entry) for entry in self._buffer],
            "random": [version, list(words), gauss],
        }

    def seek(self, position: Position) -> None:
        """Continue from a position; to be called before anything is read."""
        if position["rows"] is not None:
            self._rows.load_state_dict(position["rows"])
        self._number = position["number"]
        self._buffer = [(number, text) for number, text in position["buffer"]]
        if self._buffer or self._number:
            self._left_out.used()  # by the run that is continued
        version, words, gauss = position["random"]
        self._random.setstate((version, tuple(words), gauss))


class Track:
    """Reads documents batch by batch and remembers positions.

    Args:
        open_source: starts reading from the beginning.
        skip: documents at the front that are left out.
    """

    def __init__(self, open_source: Callable[[], Iterator[Document]], skip: int) -> None:
        self._open, self._skip = open_source, skip
        self._past: deque[Position] = deque(maxlen=REMEMBERED)

    def batches(
        self, start: Position | None, size: int, about: Callable[[], dict[str, Any]]
    ) -> Iterator[list[Document]]:
        """Batches of ``size`` documents from a position to the end of the source.

        Args:
            about: asked before each batch for what else belongs to the position; has ``rows``.
        """
        opened = self._open()
        documents = 0 if start is None else int(start["documents"])
        source: Iterator[Document] = opened
        if start is not None and start["source"] is not None:
            opened.seek(start["source"])  # type: ignore[attr-defined]
        else:
            source = islice(opened, self._skip + documents, None)
        origin = getattr(opened, "position", None)
        while True:
            # Before the first batch the documents to be left out have not been read yet.
            known = origin is not None and documents > 0
            self._past.append(
                {**about(), "documents": documents, "source": origin() if known and origin else None}
            )
            batch = list(islice(source, size))
            if not batch:
                return
            documents += len(batch)
            yield batch

    def position_at(self, rows: int) -> Position:
        """The last position remembered at or before so many rows, and how many rows to drop from there.

        Raises:
            UserError: if the stream has been read too far ahead.
        """
        for position in reversed(self._past):
            if position["rows"] <= rows:
                return {**position, "drop": rows - position["rows"]}
        raise UserError(
            f"the stream was read more than {REMEMBERED} batches of documents ahead of row {rows}; lower"
            " training.dataloader_prefetch_factor"
        )

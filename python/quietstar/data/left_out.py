"""Data that cannot be used: left out, counted, and reported with file and line."""

from __future__ import annotations

import logging

from quietstar.errors import UserError

logger = logging.getLogger("quietstar")

# Each of so many is named; after that only the 10th, the 100th and so on.
NAMED = 3


class LeftOut:
    """Counts rows, files and documents that cannot be used, and warns.

    One for a source, however often it is read: what was said in a first pass is not said again. Nothing
    is said before something could be used; where nothing can, the error says it.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._held: list[str] | None = []
        self._first: str | None = None
        self.reports = 0  # of this and of earlier passes

    @property
    def count(self) -> int:
        """How many different ones were left out."""
        return len(self._seen)

    @property
    def nothing_used(self) -> bool:
        """Whether nothing could be used so far."""
        return self._held is not None

    def add(self, where: object, why: str) -> None:
        """Leave something out.

        Args:
            where: names it as text, e.g. ``data file a.jsonl, line 3``; why: a verb and what is wrong.
        """
        name = str(where)
        self.reports += 1
        if name in self._seen:
            return
        self._seen.add(name)
        self._first = self._first or f"{name} {why}"
        number = self.count
        if number <= NAMED or str(number).rstrip("0") == "1":
            message = f"{name} {why}; it is left out ({number} so far)"
            if self._held is None:
                logger.warning(message)
            else:
                self._held.append(message)

    def used(self) -> None:
        """Something could be used."""
        if self._held is not None:
            held, self._held = self._held, None
            for message in held:
                logger.warning(message)

    def text_of(self, value: object, column: str, where: object) -> str | None:
        """A row's text, empty for null and for white space alone; None: unusable, and left out."""
        if value is None or (isinstance(value, str) and is_utf8(value)):
            self.used()
            return value if value and not value.isspace() else ""
        problem = "half of a surrogate pair, which is not a character"
        if not isinstance(value, str):
            problem = f"{type(value).__name__}; expected text"
        self.add(where, f"cannot be used: column {column!r} holds {problem}")
        return None

    def check(self, source: str) -> None:
        """Raise :class:`UserError`, naming the first that was left out, if nothing could be used."""
        if not self.nothing_used:
            return
        more = f" (and {self.count - 1} more that cannot be used)" if self.count > 1 else ""
        raise UserError(f"{self._first}{more}" if self._first else f"{source} has no rows")


def is_utf8(text: str) -> bool:
    """Whether a string can be written as UTF-8, as tokenizers need it."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

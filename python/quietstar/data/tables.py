"""Rows of local files: JSON lines, a JSON list, csv, tsv and parquet; all but parquet also as ``.gz``.

What cannot be read is left out and counted (:mod:`quietstar.data.left_out`), so that one bad line does
not end a run.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from quietstar.data.left_out import LeftOut, is_utf8
from quietstar.errors import UserError

CSV_SUFFIXES = {".csv": ",", ".tsv": "\t"}
LINES_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (*LINES_SUFFIXES, ".json", *CSV_SUFFIXES, ".parquet")
# Neither text nor a table that is read here.
BINARY_SUFFIXES = {
    ".7z", ".arrow", ".avro", ".bin", ".bz2", ".db", ".doc", ".docx", ".epub", ".feather", ".gguf",
    ".gif", ".h5", ".hdf5", ".jpeg", ".jpg", ".mp3", ".mp4", ".npy", ".npz", ".odt", ".orc", ".pdf",
    ".pickle", ".pkl", ".png", ".ppt", ".pptx", ".pt", ".pth", ".rar", ".safetensors", ".sqlite",
    ".tar", ".tgz", ".wav", ".webp", ".xls", ".xlsx", ".xz", ".zip", ".zst",
}  # fmt: skip
# So many rows without a column, and none with it, tell that the file has none.
ROWS_TO_TELL = 1000
# The text of a row may be long; csv's own limit is 128 KiB.
LONGEST_FIELD = 2**31 - 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a row is: the number of its ``unit`` (line or row) in a file, counted from 1."""

    path: Path
    unit: str
    number: int

    def __str__(self) -> str:
        return f"data file {self.path}, {self.unit} {self.number}"


# What stands at a place is a row if the file is as it should be.
Found = Iterator[tuple[Place, Any]]


def suffix_of(path: Path) -> str:
    """The suffix that says how a file is read, ``.gz`` left out."""
    return next((s.lower() for s in reversed(path.suffixes) if s.lower() != ".gz"), "")


def unsupported_reason(path: Path) -> str | None:
    """Why a file of this suffix cannot be read: it is neither text nor a table. None: it may be."""
    suffix = suffix_of(path)
    if suffix in BINARY_SUFFIXES or (suffix == ".parquet" and path.suffix.lower() == ".gz"):
        return (
            "cannot be read; expected plain text, jsonl, json, csv or tsv (each also as .gz), or parquet"
        )
    return None


def table_rows(
    path: Path, columns: Iterable[str] | None, left_out: LeftOut, kind: str = "text column"
) -> Iterator[tuple[Place, Row]]:
    """Yield the place of each row that has all ``columns`` (None: of each row), and the row.

    Args:
        path: ``.csv``, ``.tsv`` and ``.parquet`` are read as such, anything else as JSON: an object per
            line, or a list. Quotes in a ``.tsv`` are characters like any other, unless the whole file is
            properly quoted (each field that begins with a quote ends with one).
        left_out: takes the rows that lack a column, and what cannot be read.
        kind: what a column is called in a message.

    Raises:
        UserError: if no row of the file has the columns, or the file cannot be opened.
    """
    wanted, suffix = None if columns is None else list(columns), suffix_of(path)
    read = _parquet if suffix == ".parquet" else _csv if suffix in CSV_SUFFIXES else _json
    lacking: list[tuple[Place, str, Row]] = []
    empty, found, before = True, False, left_out.reports
    for where, row in read(path, wanted, left_out, kind):
        empty = False
        if not isinstance(row, dict):
            left_out.add(where, f"is a JSON {type(row).__name__}; expected an object")
            continue
        missing = next((name for name in wanted or () if name not in row), None)
        if missing is not None:
            lacking.append((where, missing, row))
        else:
            found = True
        if not found and len(lacking) >= ROWS_TO_TELL:
            break
        if found:
            for place, name, other in lacking:
                left_out.add(place, missing_column(other, name, kind))
            lacking.clear()
        if missing is None:
            yield where, row
    if lacking:
        place, name, row = lacking[0]
        check_columns(row, [name], place, kind)
    if empty and left_out.reports == before:  # what is wrong with its rows was said
        left_out.add(f"data file {path}", "has no rows")


def check_columns(
    columns: Iterable[str], wanted: Iterable[str], where: object, kind: str = "text column"
) -> None:
    """Raise :class:`UserError`, naming the columns there are, unless all of ``wanted`` are there."""
    have = list(columns)
    for name in wanted:
        if name not in have:
            hint = " (set data.text_column)" if kind == "text column" else ""
            raise UserError(f"{where} {missing_column(have, name, kind)}{hint}")


def missing_column(columns: Iterable[str], name: str, kind: str = "text column") -> str:
    """The words of an error for a row or table that has ``columns`` but not the one called ``name``."""
    listed = ", ".join(sorted(map(str, columns))) or "none"
    return f"has no {kind} {name!r}; its columns are: {listed}"


@contextmanager
def open_text(path: Path, left_out: LeftOut) -> Iterator[IO[str]]:
    """Open a text file, ``.gz`` or not.

    Bytes that are not UTF-8 become U+DC80 to U+DCFF, so that the rows around them can be read. A ``.gz``
    file that is damaged ends there, and is counted.
    """
    options: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
    if suffix_of(path) in CSV_SUFFIXES:
        options["newline"] = ""
    try:
        packed = path.suffix.lower() == ".gz"
        with gzip.open(path, "rt", **options) if packed else path.open(**options) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        left_out.add(f"data file {path}", f"cannot be read to its end ({error})")
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror or error}") from error


# ---- the formats --------------------------------------------------------------------------------


def _json(path: Path, columns: list[str] | None, left_out: LeftOut, kind: str) -> Found:
    with open_text(path, left_out) as file:
        lines = enumerate(file, start=1)
        first = next(((n, line) for n, line in lines if line.strip()), (0, ""))
        if _is_whole(first[1], suffix_of(path)):
            for content in _parse(first[1] + file.read(), f"data file {path}", left_out):
                rows = content if isinstance(content, list) else [content]
                yield from ((Place(path, "row", n), row) for n, row in enumerate(rows, start=1))
            return
        for number, line in chain([first], lines):
            if line.strip():
                where = Place(path, "line", number)
                yield from ((where, row) for row in _parse(line, where, left_out))


def _is_whole(line: str, suffix: str) -> bool:
    """Whether a file that begins with this line is one JSON value, not one per line."""
    start = line.strip()
    if start.startswith("[") and suffix not in LINES_SUFFIXES:
        return True
    return start in ("[", "{") or (start.startswith("[") and start.endswith(","))


def _parse(text: str, where: object, left_out: LeftOut) -> Iterator[Any]:
    """Yield the value of a JSON text, if it is one."""
    if not is_utf8(text):
        left_out.add(where, "is not UTF-8 text")
        return
    try:
        yield json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno} of it" if error.lineno > 1 else ""
        left_out.add(where, f"is not JSON ({error.msg}{line})")
    except ValueError:
        left_out.add(where, "is beyond the JSON parser (a number of thousands of digits)")
    except RecursionError:
        left_out.add(where, "is beyond the JSON parser (nested too deeply)")


def _csv(path: Path, columns: list[str] | None, left_out: LeftOut, kind: str) -> Found:
    csv.field_size_limit(LONGEST_FIELD)
    quoted = _is_quoted(path, left_out)
    with open_text(path, left_out) as file:
        reader = csv.reader(
            file,
            delimiter=CSV_SUFFIXES[suffix_of(path)],
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        names: list[str] | None = None
        while True:
            where = Place(path, "line", reader.line_num + 1)  # a quoted field may have several lines
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                left_out.add(where, f"cannot be read ({error})")
                continue
            if names is None:
                names = fields
                check_columns(names, columns or (), where, kind)
            elif fields and len(fields) != len(names):
                left_out.add(where, f"has {len(fields)} fields; expected {len(names)}, as in its header")
            elif fields:
                row = dict(zip(names, fields, strict=True))
                if all(is_utf8(row[name]) for name in names if columns is None or name in columns):
                    yield where, row
                else:
                    left_out.add(where, "is not UTF-8 text")


def _is_quoted(path: Path, left_out: LeftOut) -> bool:
    """Whether quotes enclose fields: always in a csv; in a tsv if all that begin a field do.

    Programs differ in how they write a tsv. One quote that is never closed would swallow all lines after
    it, so that the file is read once before its rows are.
    """
    if suffix_of(path) != ".tsv":
        return True
    try:
        with open_text(path, left_out) as file:
            for _ in csv.reader(file, delimiter="\t", strict=True):
                pass
    except csv.Error:
        return False
    return True


def _parquet(path: Path, columns: list[str] | None, left_out: LeftOut, kind: str) -> Found:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(path)
        columns = table.schema_arrow.names if columns is None else columns
        check_columns(table.schema_arrow.names, columns, f"data file {path}", kind)
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for row in range(batch.num_rows):
                number += 1
                where = Place(path, "row", number)
                try:
                    values = {name: batch.column(name)[row].as_py() for name in columns}
                except UnicodeDecodeError:
                    left_out.add(where, "is not UTF-8 text")
                    continue
                yield where, values
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        left_out.add(f"data file {path}", f"cannot be read as parquet{after} ({error})")

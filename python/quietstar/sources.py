"""Where text comes from: local files, a data set of the Hugging Face hub, or the standard library.

Every source yields :class:`~quietstar.corpora.Document` one after the other and holds no more than
one file (txt) or one batch of rows (jsonl, parquet, hub) in memory. What is wrong with a source is
said before training starts, in one sentence.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from quietstar.corpora import Document, load_stdlib
from quietstar.errors import UserError
from quietstar.streams import HubStream

STDLIB = "stdlib"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TXT_DOCUMENTS = ("file", "paragraph", "line")


def local_documents(
    patterns: str | Iterable[str], *, text_column: str = "text", txt_documents: str = "file"
) -> Iterator[Document]:
    """Yield the documents of local files: parquet, jsonl (``.jsonl .ndjson .json``), else plain
    text.

    ``patterns``: paths or globs (``**`` works). A row of a table is a document; ``txt_documents``
    says what a document is in a text file: the ``file``, a ``paragraph`` (blank lines between) or a
    ``line``. Files ending in ``.gz`` are decompressed (not parquet). Raises :class:`UserError` for
    a missing or empty file, a missing column and text that is not UTF-8.
    """
    if txt_documents not in TXT_DOCUMENTS:
        raise UserError(
            f"data.txt_documents is {txt_documents!r}; expected one of {', '.join(TXT_DOCUMENTS)}"
        )
    for path in expand_files(patterns):
        suffixes = [s.lower() for s in path.suffixes]
        suffix = next((s for s in reversed(suffixes) if s != ".gz"), "")
        if suffix == ".parquet":
            yield from _parquet(path, text_column)
        elif suffix in JSON_SUFFIXES:
            yield from _jsonl(path, text_column)
        else:
            yield from _txt(path, txt_documents)


def expand_files(patterns: str | Iterable[str]) -> list[Path]:
    """The files that ``patterns`` (paths or globs) name, sorted within each pattern, each once.

    Raises :class:`UserError` for a pattern that matches nothing, a folder and an empty file.
    """
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        expanded = str(Path(pattern).expanduser())
        path = Path(expanded)
        if path.is_dir():
            raise UserError(f"{pattern} is a folder; name its files, e.g. {pattern}/*.txt")
        if path.exists():
            matches = [path]
        else:
            matches = [Path(m) for m in sorted(glob.glob(expanded, recursive=True))]
            matches = [m for m in matches if m.is_file()]
            if not matches:
                kind = "pattern matches no file" if glob.has_magic(pattern) else "does not exist"
                raise UserError(f"data file {pattern} {kind} (looked from {Path.cwd()})")
        for match in matches:
            if match.stat().st_size == 0:
                raise UserError(f"data file {match} is empty; expected text")
            found[match] = None
    if not found:
        raise UserError("data.files names no file")
    return list(found)


def hub_documents(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
    revision: str | None = None,
) -> Iterator[Document]:
    """Yield the rows of a data set by its name on the hub (or a folder that `datasets` can load).

    With ``streaming`` nothing is stored, and ``shuffle_buffer`` > 0 shuffles within a buffer of
    that many rows. Raises :class:`UserError` where the data set, split or column cannot be had.
    """
    import datasets

    try:
        rows = datasets.load_dataset(
            name, config_name, split=split, streaming=streaming, revision=revision
        )
    except Exception as error:  # `datasets` raises its own, HTTP, OS and value errors alike
        detail = " ".join(str(error).split())
        where = f"{name} (config {config_name})" if config_name else name
        raise UserError(f"cannot load split {split!r} of data set {where}: {detail[:400]}") from error
    columns: list[str] | None = rows.column_names
    if columns is not None:
        check_column(columns, text_column, f"data set {name}")
        rows = rows.select_columns([text_column])

    def text_of(row: dict[str, Any], number: int) -> str:
        return _text_of(row, text_column, f"row {number} of {name}")

    if streaming and shuffle_buffer > 0:
        # The order of the shards alone; rows are shuffled by a buffer that a position can hold.
        rows = rows.shuffle(seed=seed, buffer_size=1)
    if streaming:
        return HubStream(rows, name, text_of, shuffle_buffer, seed)
    return (Document(f"{name}:{n}", text_of(row, n)) for n, row in enumerate(rows))


def open_documents(
    *, name: str | None, files: list[str] | None, split: str, **options: Any
) -> Callable[[], Iterator[Document]]:
    """A function that starts reading the source from its beginning (so that it can be read again).

    Exactly one of ``name`` (hub name or ``stdlib``) and ``files`` is given; ``options`` are the
    other arguments of :func:`hub_documents` and :func:`local_documents`.
    """
    if (name is None) == (not files):
        raise UserError(
            "data needs exactly one of name (a data set) and files (local files); "
            + ("both are given" if name else "neither is given")
        )
    if files:
        kept = {k: options[k] for k in ("text_column", "txt_documents") if k in options}
        expand_files(files)  # a missing file is found now, not when reading starts
        return lambda: local_documents(files, **kept)
    assert name is not None
    if name == STDLIB:
        part = "heldout" if split in ("heldout", "test", "validation") else split
        return lambda: load_stdlib(part)
    options.pop("txt_documents", None)
    return lambda: hub_documents(name, split=split, **options)


def check_column(columns: Iterable[str], text_column: str, where: str) -> None:
    """Raise :class:`UserError`, naming the columns there are, unless ``text_column`` is one."""
    if text_column not in columns:
        have = ", ".join(sorted(columns)) or "none"
        raise UserError(
            f"{where} has no text column {text_column!r}; its columns are: {have} (set data.text_column)"
        )


def _text_of(row: dict[str, Any], text_column: str, where: str) -> str:
    check_column(row, text_column, where)
    text = row[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: column {text_column!r} holds {type(text).__name__}; expected text")
    return text


def _open_text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _txt(path: Path, txt_documents: str) -> Iterator[Document]:
    any_text = False
    try:
        with _open_text(path) as file:
            for number, text in enumerate(_cut(file, txt_documents)):
                if text.strip():
                    any_text = True
                    yield Document(str(path) if txt_documents == "file" else f"{path}:{number}", text)
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text (byte {error.start})") from error
    except (OSError, EOFError) as error:
        raise UserError(f"data file {path} cannot be read: {error}") from error
    if not any_text:
        raise UserError(f"data file {path} holds nothing but white space; expected text")


def _cut(file: IO[str], txt_documents: str) -> Iterator[str]:
    if txt_documents == "file":
        yield file.read()
    elif txt_documents == "line":
        for line in file:
            yield line.rstrip("\n")
    else:
        lines: list[str] = []
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
        yield "".join(lines)


def _jsonl(path: Path, text_column: str) -> Iterator[Document]:
    number = rows = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"data file {path}, line {number} is not JSON ({error.msg}); expected one "
                        "object per line"
                    ) from error
                where = f"data file {path}, line {number}"
                if not isinstance(row, dict):
                    raise UserError(f"{where} is a JSON {type(row).__name__}; expected an object")
                rows += 1
                yield Document(f"{path}:{number}", _text_of(row, text_column, where))
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text (after line {number})") from error
    except (OSError, EOFError) as error:
        raise UserError(f"data file {path} cannot be read: {error}") from error
    if rows == 0:
        raise UserError(f"data file {path} has no rows; expected one JSON object per line")


def _parquet(path: Path, text_column: str) -> Iterator[Document]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data file {path} cannot be read as parquet: {error}") from error
    check_column(table.schema_arrow.names, text_column, f"data file {path}")
    if table.metadata.num_rows == 0:
        raise UserError(f"data file {path} has no rows; expected text")
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
        for text in batch.column(0).to_pylist():
            where = f"data file {path}, row {number}"
            yield Document(f"{path}:{number}", _text_of({text_column: text}, text_column, where))
            number += 1

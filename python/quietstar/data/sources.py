"""Where text comes from: local files, a data set of the Hugging Face hub, or the standard library.

Every source yields :class:`~quietstar.data.stdlib.Document` one after the other and holds no more than
one file (txt, a JSON list) or one batch of rows (jsonl, csv, parquet, hub) in memory. What is wrong with
a source is said before training starts, in one sentence; single rows and files that cannot be used are
left out with a warning (:mod:`quietstar.data.left_out`).
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from quietstar.data import lookup, sums
from quietstar.data.blocks import TokenBlocks
from quietstar.data.hub import from_hub
from quietstar.data.left_out import LeftOut, is_utf8
from quietstar.data.readers import RowReader, row_reader
from quietstar.data.stdlib import Document, load_stdlib, stdlib_tokenizer
from quietstar.data.streams import HubStream
from quietstar.data.tables import (
    TABLE_SUFFIXES,
    Place,
    check_columns,
    open_text,
    suffix_of,
    table_rows,
    unsupported_reason,
)
from quietstar.errors import UserError, blaming

# What these names stand for; another name is a data set, or a tokenizer, of the hub.
# Texts: a split to its documents.
CORPORA: dict[str, Callable[[str], Iterator[Document]]] = {"stdlib": load_stdlib}
# Sources without an end that make tokens themselves: see :func:`quietstar.data.lookup.token_blocks`.
GENERATORS: dict[str, Callable[..., tuple[TokenBlocks, TokenBlocks | None]]] = {
    "lookup": lookup.token_blocks
}
# The size of a vocabulary to a tokenizer.
TOKENIZERS: dict[str, Callable[[int], PreTrainedTokenizerBase]] = {
    "stdlib": stdlib_tokenizer,
    "lookup": lambda _: lookup.build_tokenizer(),
    "sums": lambda _: sums.build_tokenizer(),
}
TXT_DOCUMENTS = ("file", "paragraph", "line")


def local_documents(
    patterns: str | Iterable[str],
    *,
    text_column: str | RowReader = "text",
    txt_documents: str = "file",
    left_out: LeftOut | None = None,
) -> Iterator[Document]:
    """Yield the documents of local files: tables (parquet, jsonl, json, csv, tsv), else plain text.

    Args:
        patterns: paths or globs (``**`` works). Files ending in ``.gz`` are decompressed (not parquet).
        text_column: a row of a table is a document, and this its text; or a reader, which makes a
            document of it (:mod:`quietstar.data.readers`).
        txt_documents: what a document is in a text file: the ``file``, a ``paragraph`` (blank lines
            between) or a ``line``.
        left_out: counts the rows and files that cannot be used (not UTF-8, not JSON, ...). A row without
            text is a document without text.

    Raises:
        UserError: for a missing file or column, and where nothing at all can be used.
    """
    if txt_documents not in TXT_DOCUMENTS:
        raise UserError(
            f"data.txt_documents is {txt_documents!r}; expected one of {', '.join(TXT_DOCUMENTS)}"
        )
    left_out = LeftOut() if left_out is None else left_out
    reader, paths = row_reader(text_column), expand_files(patterns, left_out)
    for path in paths:
        if path.stat().st_size == 0:
            left_out.add(f"data file {path}", "is empty; expected text")
        elif suffix_of(path) in TABLE_SUFFIXES:
            for where, row in table_rows(path, reader.columns, left_out, reader.kind):
                fields = reader.read(row, where, left_out)
                if fields is not None:
                    yield Document(f"{path}:{where.number}", *fields)
        elif not reader.reads_text:
            raise UserError(
                f"data file {path} is plain text; expected rows with columns (jsonl, json, csv, tsv or"
                " parquet) for prompts and completions"
            )
        else:
            for document in _txt(path, txt_documents, left_out):
                left_out.used()
                yield document
    left_out.check(f"data file {paths[0]}")


def expand_files(patterns: str | Iterable[str], left_out: LeftOut | None = None) -> list[Path]:
    """The files that ``patterns`` (paths or globs) name, sorted within each pattern, each once.

    What a glob matches and is neither text nor a table (a picture) is left out, and counted in
    ``left_out``. Raises :class:`UserError` for a pattern that matches nothing to be read, a folder, such
    a file given by its name, and where all files are empty.
    """
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        expanded = str(Path(pattern).expanduser())
        path = Path(expanded)
        if path.is_dir():
            raise UserError(f"{pattern} is a folder; name its files, e.g. {pattern}/*.txt")
        names = [expanded] if path.exists() else sorted(glob.glob(expanded, recursive=True))
        matches = [Path(name) for name in names if path.exists() or Path(name).is_file()]
        if not matches:
            missing = f"data file {pattern} does not exist"
            if glob.has_magic(pattern):
                missing = f"no data file matches {pattern}"
            raise UserError(f"{missing} (looked from {Path.cwd()})")
        reasons = {match: unsupported_reason(match) for match in matches}
        if all(reasons.values()):
            raise UserError(f"data file {matches[0]} {reasons[matches[0]]}")
        for match, reason in reasons.items():
            if reason is None:
                found[match] = None
            elif left_out is not None:
                left_out.add(f"data file {match}", reason)
    if not found:
        raise UserError("data.files names no file")
    if all(match.stat().st_size == 0 for match in found):
        more = f" (as are the {len(found) - 1} others)" if len(found) > 1 else ""
        raise UserError(f"data file {next(iter(found))} is empty; expected text{more}")
    return list(found)


def hub_documents(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str | RowReader = "text",
    streaming: bool = False,
    shuffle: tuple[int, int] = (0, 0),
    revision: str | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[Document]:
    """Yield the rows of a data set by its name on the hub (or a folder that `datasets` can load).

    With ``streaming`` nothing is stored; ``shuffle`` is then how many rows are held for shuffling (0:
    none) and the seed. ``left_out`` counts the rows that cannot be used.

    Raises:
        UserError: if the data set, split or column does not exist, or no row can be used.
    """
    import datasets

    config = f" (config {config_name})" if config_name else ""
    with (
        blaming(f"cannot load split {split!r} of data set {name}{config}"),
        from_hub("data set", name),
    ):
        rows = datasets.load_dataset(
            name, config_name, split=split, streaming=streaming, revision=revision
        )
    columns: list[str] | None = rows.column_names
    reader = row_reader(text_column)
    if columns is not None and reader.columns is not None:
        check_columns(columns, reader.columns, f"data set {name}", reader.kind)
        rows = rows.select_columns(reader.columns)
    if not streaming:
        if not len(rows):
            raise UserError(f"data set {name} has no rows")
        rows, shuffle = rows.to_iterable_dataset(), (0, 0)
    elif shuffle[0] > 0:
        # The order of the shards alone; rows are shuffled by a buffer that a position can hold.
        rows = rows.shuffle(seed=shuffle[1], buffer_size=1)
    return HubStream(rows, name, reader, *shuffle, LeftOut() if left_out is None else left_out)


def open_documents(
    *, name: str | None, files: list[str] | None, split: str, **options: Any
) -> Callable[[], Iterator[Document]]:
    """A function that starts reading the source from its beginning (so that it can be read again).

    Exactly one of ``name`` (of :data:`CORPORA` or on the hub) and ``files`` is given; ``options`` are
    the other arguments of :func:`hub_documents` and :func:`local_documents`, with ``shuffle_buffer`` and
    ``seed`` for the former's ``shuffle``.
    """
    left_out = LeftOut()
    if files:
        kept = {k: options[k] for k in ("text_column", "txt_documents") if k in options}
        expand_files(files)  # a missing file is found now, not when reading starts
        return lambda: local_documents(files, left_out=left_out, **kept)
    assert name is not None
    if name in CORPORA:
        return lambda: CORPORA[name](split)
    options.pop("txt_documents", None)
    shuffle = (options.pop("shuffle_buffer", 0), options.pop("seed", 0))
    return lambda: hub_documents(name, split=split, shuffle=shuffle, left_out=left_out, **options)


def _txt(path: Path, txt_documents: str, left_out: LeftOut) -> Iterator[Document]:
    any_text = False
    with open_text(path, left_out) as file:
        for number, text in _cut(file, txt_documents):
            if text.strip():
                any_text, whole = True, txt_documents == "file"
                if is_utf8(text):
                    yield Document(str(path) if whole else f"{path}:{number}", text)
                else:
                    where = f"data file {path}" if whole else Place(path, "line", number)
                    left_out.add(where, "is not UTF-8 text")
    if not any_text:
        left_out.add(f"data file {path}", "holds nothing but white space; expected text")


def _cut(file: IO[str], txt_documents: str) -> Iterator[tuple[int, str]]:
    """The documents of a text file, and the number of the line that each begins in."""
    if txt_documents == "file":
        yield 1, file.read()
    elif txt_documents == "line":
        for number, line in enumerate(file, start=1):
            yield number, line.rstrip("\n")
    else:
        lines: list[str] = []
        number = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                lines.append(line)
            elif lines:
                yield number - len(lines), "".join(lines)
                lines = []
        yield number - len(lines) + 1, "".join(lines)

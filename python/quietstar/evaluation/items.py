"""The items of a benchmark: rows of a hub data set, or of a local file with the same columns."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quietstar.errors import UserError

Row = dict[str, Any]


def load_rows(
    columns: Iterable[str],
    *,
    data: Path | None,
    hub_name: str,
    hub_config: str | None,
    split: str,
    limit: int | None = None,
) -> list[Row]:
    """Rows with exactly ``columns``: from ``data`` (json, jsonl or parquet), else from the hub.

    Raises:
        UserError: names the data set or file, and the column, that is missing or cannot be read.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; expected a whole number >= 1")
    if data is None:
        rows, where = _from_hub(hub_name, hub_config, split, limit), f"data set {hub_name}"
    else:
        rows, where = read_table(data), f"data file {data}"
    rows = rows[:limit]
    if not rows:
        raise UserError(f"{where} has no rows")
    wanted = list(columns)
    for number, row in enumerate(rows, start=1):
        missing = [name for name in wanted if name not in row]
        if missing:
            have = ", ".join(sorted(row)) or "none"
            raise UserError(
                f"{where}, row {number}, has no column {missing[0]!r}; its columns are: {have}; expected"
                f" those of {hub_name}: {', '.join(wanted)}"
            )
    return [{name: row[name] for name in wanted} for row in rows]


def read_table(path: Path) -> list[Row]:
    """All rows of a local file: a JSON list, JSON lines, or parquet."""
    if not path.is_file():
        raise UserError(f"data file {path} does not exist")
    if path.suffix.lower() == ".parquet":
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet

        try:
            rows: Any = parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"data file {path} cannot be read as parquet: {error}") from error
        return list(rows)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text (byte {error.start})") from error
    rows = _parse_json(path, text)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(
                f"data file {path}, row {number}, is a JSON {type(row).__name__}; expected an object"
            )
    return rows


def _parse_json(path: Path, text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(
                f"data file {path}, line {error.lineno} is not JSON ({error.msg})"
            ) from error
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"data file {path}, line {number} is not JSON ({error.msg}); expected one object per"
                    " line, or a list of objects"
                ) from error
    return rows


def _from_hub(name: str, config: str | None, split: str, limit: int | None) -> list[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # `datasets` raises its own, HTTP, OS and value errors alike
        detail = " ".join(str(error).split())
        raise UserError(
            f"cannot load split {split!r} of data set {name}: {detail[:300]} (a local file of the same"
            " columns can be given with --data)"
        ) from error
    return list(rows if limit is None else rows.select(range(min(limit, len(rows)))))

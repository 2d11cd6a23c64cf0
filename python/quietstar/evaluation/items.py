"""The items of a benchmark: rows of a hub data set, or of a local file with the same columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from quietstar.data.hub import from_hub
from quietstar.data.left_out import LeftOut, is_utf8
from quietstar.data.tables import check_columns, missing_column, table_rows, unsupported_reason
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
    check: Callable[[Row], object] = lambda row: None,
    as_on_hub: Callable[[Row], Row] | None = None,
) -> list[Row]:
    """Rows with exactly ``columns``: from ``data`` (jsonl, json, csv, tsv, parquet), else from the hub.

    Args:
        limit: the first so many of those that can be used.
        check: raises :class:`UserError` for a row that cannot be used; it is left out with a warning.
        as_on_hub: gives a row of another layout the hub's columns.

    Raises:
        UserError: names the data set or file, and the column, that is missing or cannot be read; or the
            first row where none can be used.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; expected a whole number >= 1")
    wanted, left_out = list(columns), LeftOut()
    found: Iterator[tuple[object, Row]]
    if data is None:
        where = f"data set {hub_name}"
        found = _from_hub(hub_name, hub_config, split, wanted)
    else:
        where = f"data file {data}"
        if not data.is_file():
            raise UserError(f"data file {data} does not exist")
        if (why := unsupported_reason(data)) is not None:
            raise UserError(f"{where} {why}")
        found = table_rows(data, None if as_on_hub else wanted, left_out, kind="column")
    rows: list[Row] = []
    for place, row in found:
        if len(rows) == limit:
            break
        if as_on_hub is not None:
            row = as_on_hub(row)
        missing = next((name for name in wanted if name not in row), None)
        if missing is not None:
            left_out.add(place, missing_column(row, missing, kind="column"))
            continue
        plain = {name: row[name] for name in wanted}
        try:
            if not is_utf8(json.dumps(plain, ensure_ascii=False, default=str)):
                raise UserError("it contains half of a surrogate pair, which is not a character")
            check(plain)
        except UserError as error:
            left_out.add(place, f"cannot be used: {error}")
            continue
        left_out.used()
        rows.append(plain)
    left_out.check(where)
    return rows


def _from_hub(
    name: str, config: str | None, split: str, columns: list[str]
) -> Iterator[tuple[object, Row]]:
    import datasets

    instead = "; --data takes a local file of the same columns"
    try:
        with from_hub("data set", name, instead):
            rows = datasets.load_dataset(name, config, split=split)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises its own, HTTP, OS and value errors alike
        detail = " ".join(str(error).split())
        raise UserError(
            f"cannot load split {split!r} of data set {name}: {detail[:300]}{instead}"
        ) from error
    check_columns(rows.column_names, columns, f"data set {name}", kind="column")
    return ((f"data set {name}, row {n}", row) for n, row in enumerate(rows, start=1))

"""Text made of a row's columns: Python's format strings, without its attributes, and words besides.

    Question: {Body:sentence} {Question}\\nAnswer:

- ``{column}`` is a column, ``{column.key}`` or ``{column[key]}`` a part of one that is nested. The value
  is text or a number; anything else needs a format that makes text of it.
- ``{column:spec}`` is one of Python's format specs (``{Answer:g}``, ``{Price:.2f}``). Where it is one
  for numbers, text that reads as a number is one (a csv has nothing else), and 51.0 is whole for ``:d``.
- ``{column:word}`` is a format of :data:`FORMATS`, for what data sets have and Python has no spec for.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from quietstar.data.left_out import is_utf8
from quietstar.errors import UserError, did_you_mean

_PARTS = re.compile(r"\.([^.\[\]]+)|\[([^\[\]]+)\]")
# How Python's specs for numbers end.
_NUMERIC = re.compile(r"[bcdeEfFgGnoxX%]$")
_GROUPED = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")
# Written out, what is larger would be no answer that anybody gives.
MAX_EXPONENT = 50
_ANNOTATION = re.compile(r"<<[^<>]*>>")


class Unfit(Exception):
    """A value that a format cannot make text of; says what it is and what was expected."""


def number(value: Any) -> str:
    """A number in digits: ``51.0`` and ``"51.0"`` are 51, ``"1,200"`` is 1200, 0.5 is 0.5."""
    found = _decimal(value)
    if found == found.to_integral_value():
        return str(int(found))
    return format(found.normalize(), "f")


def sentence(value: Any) -> str:
    """Text without white space around it, closed by a full stop unless it ends in a mark."""
    text = _text(value).strip()
    return text if not text or re.search(r"[.!?…:;][\"')\]]*$", text) else f"{text}."


def equation(value: Any) -> str:
    """``( 43.0 - 21.0 )`` as ``43 - 21``: whole numbers in digits, no brackets around all of it."""
    text = re.sub(r"(?<![\d.])(\d+)\.0+(?!\d)", r"\1", _text(value).strip())
    text = re.sub(r"\(\s+", "(", re.sub(r"\s+\)", ")", text))
    while _encloses(text):
        text = text[1:-1].strip()
    return text


def final(value: Any) -> str:
    """What stands behind the last ``####`` (GSM8K's answer), as it is written there: 70,000."""
    return _text(value).rsplit("####", 1)[-1].strip()


def steps(value: Any) -> str:
    """What stands before the last ``####`` (GSM8K's rationale), without ``<<48/2=24>>``."""
    return _ANNOTATION.sub("", _text(value).rsplit("####", 1)[0]).strip()


def choices(value: Any) -> str:
    """A line ``(A) text`` for each choice, of ``{label, text}``, lists or a list of them."""
    if isinstance(value, Mapping):
        parts: list[Any] = [value.get("label"), value.get("text")]
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        parts = [[each.get(name) for each in value] for name in ("label", "text")]
    else:
        parts = [None, None]
    whole = all(isinstance(p, list) and p and all(isinstance(x, str) for x in p) for p in parts)
    if not whole or len(parts[0]) != len(parts[1]):
        raise Unfit(f"{value!r:.80}; expected labels and texts of choices")
    return "\n".join(f"({label}) {text}" for label, text in zip(*parts, strict=True))


# The words that a template knows beside Python's format specs.
FORMATS: dict[str, Callable[[Any], str]] = {
    made.__name__: made for made in (number, sentence, equation, final, steps, choices)
}


class Template:
    """A checked template.

    Args:
        text: with its fields in braces (``{{`` is a brace); name: what an error calls it.

    Attributes:
        fields: the columns, with the keys inside nested ones, as the template spells them.

    Raises:
        UserError: for a template that no row can fill.
    """

    def __init__(self, text: str, name: str):
        self.text, self.name = text, name
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{name} is {text!r}, which is no template: {error}") from None
        self.fields: list[str] = []
        for _, field, spec, conversion in self._parts:
            if field is None:
                continue
            self._check(field, spec or "", conversion)
            self.fields.append(field)

    def _check(self, field: str, spec: str, conversion: str | None) -> None:
        if not re.fullmatch(rf"[^.\[\]{{}}]+(?:{_PARTS.pattern})*", field):
            raise UserError(
                f"{self.name} is {self.text!r} with the field {{{field}}}; expected a column, e.g."
                " {question} or {question.stem}"
            )
        if conversion:
            raise UserError(
                f"{self.name} is {self.text!r} with the conversion !{conversion} of {{{field}}};"
                f" expected a format behind a colon: Python's, or {', '.join(FORMATS)}"
            )
        if spec not in FORMATS and not any(_takes(value, spec) for value in ("x", 1, 1.5)):
            raise UserError(
                f"{self.name} is {self.text!r} with the format {spec!r} of column {field!r}; expected"
                f" one of Python's, or {', '.join(FORMATS)}{did_you_mean(spec, list(FORMATS))}"
            )

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has all columns."""
        return all(_find(row, field) is not _MISSING for field in self.fields)

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text of a row.

        Raises:
            UserError: goes on behind the name of the row; names column and template.
        """
        return "".join(self._pieces(row))

    def _pieces(self, row: Mapping[str, Any]) -> Iterator[str]:
        for literal, field, spec, _ in self._parts:
            yield literal
            if field is None:
                continue
            value = _find(row, field)
            if value is _MISSING:
                listed = ", ".join(sorted(map(str, _names(row)))) or "none"
                raise UserError(
                    f"has no column {field!r} for {self.name} {self.text!r}; its columns are: {listed}"
                )
            try:
                yield _shown(value, spec or "")
            except Unfit as error:
                raise UserError(
                    f"cannot fill {self.name} {self.text!r}: column {field!r} holds {error}"
                ) from None


_MISSING = object()


def _find(row: Mapping[str, Any], field: str) -> Any:
    """The value that a field names; parts are keys of mappings and places in lists, never attributes."""
    if field in row:  # a column may have a dot in its name
        return row[field]
    first = re.split(r"[.\[]", field, maxsplit=1)[0]
    value: Any = row.get(first, _MISSING)
    for key, index in _PARTS.findall(field[len(first) :]):
        part = key or index
        if isinstance(value, Mapping):
            value = value.get(part, _MISSING)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{key}" for key in value)


def _shown(value: Any, spec: str) -> str:
    if value is None:
        raise Unfit("null; expected text or a number")
    if spec in FORMATS:
        text = FORMATS[spec](value)
    elif not isinstance(value, str | int | float):
        raise Unfit(f"a {type(value).__name__}; expected text or a number")
    else:
        text = _formatted(value, spec)
    if not is_utf8(text):
        raise Unfit("half of a surrogate pair, which is not a character")
    return text


def _formatted(value: str | int | float, spec: str) -> str:
    if _NUMERIC.search(spec):
        if isinstance(value, str):
            exact = _decimal(value)
            value = int(exact) if exact == exact.to_integral_value() else float(exact)
        if isinstance(value, float) and spec[-1] in "bcdoxX" and value.is_integer():
            value = int(value)
    try:
        return format(value, spec)
    except (ValueError, OverflowError) as error:
        raise Unfit(f"{value!r:.80}, which the format {spec!r} does not take ({error})") from None


def _takes(value: Any, spec: str) -> bool:
    try:
        format(value, spec)
    except ValueError:
        return False
    return True


def _decimal(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unfit(f"a {type(value).__name__}; expected a number")
    text = str(value).strip()
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    try:
        found = Decimal("nan" if "_" in text else text)
    except InvalidOperation:
        found = Decimal("nan")
    if not found.is_finite() or abs(found.adjusted()) > MAX_EXPONENT:
        raise Unfit(f"{value!r:.80}; expected a number")
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unfit(f"a {type(value).__name__}; expected text")
    return str(value)


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last."""
    if not (text.startswith("(") and text.endswith(")")):
        return False
    depth = 0
    for place, sign in enumerate(text, start=1):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return place == len(text)
    return False

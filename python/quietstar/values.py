"""Checking a YAML value against a Python type annotation, and YAML without its traps."""

from __future__ import annotations

import enum
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Literal, Union

import yaml

from quietstar.errors import UserError


class Mismatch(Exception):
    """A value does not fit its annotation."""


class RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader (data only), without the surprises of YAML 1.1.

    ``1e-6`` is a number (plain YAML 1.1 wants ``1.0e-6``), ``no``/``off``/``yes``/``on`` stay words
    (``eval_strategy: no`` is a setting, not a boolean), dates and sexagesimal numbers stay words,
    and a duplicate key is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise UserError(f"key {key!r} is a {type(key).__name__}; expected a word (line {line})")
            if key in seen:
                raise UserError(f"key {key!r} appears twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_SCALARS = {
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?[0-9][0-9_]*"),
    "float": (
        "-+.0123456789",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    ),
}
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_first, _pattern) in _SCALARS.items():
    RecipeLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))  # 010 is ten, not eight


RecipeLoader.add_constructor("tag:yaml.org,2002:int", _integer)


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML as data; raises :class:`UserError` with the line where it cannot be read."""
    try:
        return yaml.load(text, Loader=RecipeLoader)  # a SafeLoader: data only
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except RecursionError:
        raise UserError(f"{where} is nested too deeply, or contains an alias of itself") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = _quoting_hint(text, mark.line) if mark else ""
        raise UserError(f"{where}{line} is not valid YAML: {problem}{hint}") from error


# YAML gives these another meaning at the start of a word, which may be a path, a glob or a model's name.
_SIGNS = "*&!%@`|>"
_SIGNED_WORD = re.compile(rf"(?:^|[\s\[{{,])([{_SIGNS}][^\s,\]}}]+)")


def _quoting_hint(text: str, line: int) -> str:
    """How to write what may have been meant as text in a line that is not valid YAML."""
    lines = text.splitlines()
    found = _SIGNED_WORD.search(lines[line]) if line < len(lines) else None
    return f" (text that begins with {found[1][0]} is put in quotes: '{found[1]}')" if found else ""


def load_word(text: str, where: str) -> Any:
    """The value of a ``key=value`` word: YAML, but text where YAML would give it another meaning.

    So ``*.txt`` needs no quotes, which a shell would take away, nor does what has a ``#`` in it.
    """
    word = text.strip()
    if word[:1] in {*_SIGNS, "#"}:
        return word
    if " #" in word and word[0] not in "\"'[{":
        return word
    try:
        return load_yaml(text, where)
    except UserError as error:
        if word[0] not in "[{" or "quotes" in str(error):
            raise
        raise UserError(f"{error} (if it is text: \"'{word}'\")") from error


def typed(name: str, value: Any, annotation: Any) -> Any:
    """``value`` as the annotated type; raises :class:`UserError`, which calls the value ``name``."""
    try:
        return coerce(value, annotation)
    except Mismatch:
        raise UserError(f"{name} is {value!r}; expected {describe(annotation)}") from None


def coerce(value: Any, annotation: Any) -> Any:
    """``value`` as the annotated type, or :class:`Mismatch`.

    Lossless conversions only: a whole float where an integer is wanted, an integer or a numeric
    string where a float is wanted. A boolean is never a number.
    """
    arguments = typing.get_args(annotation)
    kind = typing.get_origin(annotation) or annotation
    if kind in (Union, types.UnionType):
        return _coerce_union(value, arguments)
    if kind in (int, float):
        return _number(value, kind)
    if kind is list and arguments and isinstance(value, list):
        return [coerce(entry, arguments[0]) for entry in value]
    if _is_enum(kind):
        try:
            return kind(value).value
        except ValueError:
            raise Mismatch from None
    if kind is Literal:
        fits = value in arguments
    else:
        fits = kind is Any or value is kind or (isinstance(kind, type) and isinstance(value, kind))
    if not fits:
        raise Mismatch
    return value


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _coerce_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    if any(map(_is_enum, kinds)):
        # `SchedulerType | str` means a word of the enumeration, not any word.
        kinds = tuple(kind for kind in kinds if kind is not str)
    # The exact type first, so that "1" stays text in `str | float` and 1 an integer in `float | int`.
    if type(value) in kinds:
        return value
    for kind in kinds:
        try:
            return coerce(value, kind)
        except Mismatch:
            continue
    raise Mismatch


def _number(value: Any, kind: type) -> int | float:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        raise Mismatch from None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise Mismatch
    if kind is float:
        return float(number)
    if isinstance(number, float) and not number.is_integer():
        raise Mismatch
    return int(number)


def leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, each with its dotted key."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe(annotation: Any) -> str:
    """An annotation in plain words, for error messages."""
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "a mapping",
        list: "a list",
        type(None): "null",
        None: "null",
    }
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    if kind is Literal:
        return " or ".join(map(repr, arguments))
    if kind is list and arguments and arguments[0] is not Any:
        return f"a list of {describe(arguments[0])} each"
    if _is_enum(kind):
        return "one of " + ", ".join(str(member.value) for member in kind)
    return words.get(kind, str(getattr(annotation, "__name__", annotation)))

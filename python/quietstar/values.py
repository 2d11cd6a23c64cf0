"""Checking a YAML value against a Python type annotation, and YAML without its traps."""

from __future__ import annotations

import enum
import re
import types
import typing
from collections.abc import Hashable
from typing import Any, Literal, Union

import yaml

from quietstar.errors import UserError


class Mismatch(Exception):
    """A value does not fit its annotation."""


class RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader (data only), without what surprises in a recipe.

    ``1e-6`` is a number (plain YAML 1.1 wants ``1.0e-6``), ``no``/``off``/``yes``/``on`` stay words
    (``eval_strategy: no`` is a setting, not a boolean), dates and sexagesimal numbers stay words,
    and a key that comes twice is refused.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise UserError(f"key {key!r} is a {type(key).__name__}; expected a word (line {line})")
            if key in seen:
                raise UserError(f"key {key!r} comes twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_REPLACED = {"tag:yaml.org,2002:" + kind for kind in ("bool", "float", "int", "timestamp")}
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    RecipeLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
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
        raise UserError(f"{where} is nested too deeply, or holds an alias of itself") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = _quoting_hint(text, mark.line) if mark else ""
        raise UserError(f"{where}{line} is not valid YAML: {problem}{hint}") from error


# What begins with one of these is no word to YAML, but may be a path, a glob or a model's name.
_SIGNS = "*&!%@`|>"
_SIGNED_WORD = re.compile(rf"(?:^|[\s\[{{,])([{_SIGNS}][^\s,\]}}]+)")


def _quoting_hint(text: str, line: int) -> str:
    """How to write what may have been meant as text in a line that is not valid YAML."""
    lines = text.splitlines()
    found = _SIGNED_WORD.search(lines[line]) if line < len(lines) else None
    return f" (text that begins with {found[1][0]} is put in quotes: '{found[1]}')" if found else ""


def load_word(text: str, where: str) -> Any:
    """The value of a ``key=value`` word: YAML, but a word that YAML has another use for is text.

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


def coerce(value: Any, annotation: Any) -> Any:
    """``value`` as the annotated type, or :class:`Mismatch`.

    Lossless conversions only: a whole float where an integer is wanted, an integer or a numeric
    string where a float is wanted. A boolean is never a number.
    """
    if annotation is Any:
        return value
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, arguments)
    if origin is Literal:
        if value in arguments:
            return value
        raise Mismatch
    if annotation is None or annotation is type(None):
        if value is None:
            return None
        raise Mismatch
    if origin is list or annotation is list:
        if not isinstance(value, list):
            raise Mismatch
        return [coerce(v, arguments[0]) for v in value] if arguments else value
    if origin is dict or annotation is dict:
        if not isinstance(value, dict):
            raise Mismatch
        return value
    return _coerce_plain(value, annotation)


def _coerce_union(value: Any, arguments: tuple[Any, ...]) -> Any:
    if any(isinstance(a, type) and issubclass(a, enum.Enum) for a in arguments):
        # `SchedulerType | str` means a word of the enumeration, not any word.
        arguments = tuple(a for a in arguments if a is not str)
    # The exact type first, so that "1" stays text in `str | float` and 1 an integer in `float |
    # int`.
    for argument in arguments:
        if isinstance(argument, type) and type(value) is argument:
            return value
    for argument in arguments:
        try:
            return coerce(value, argument)
        except Mismatch:
            continue
    raise Mismatch


def _coerce_plain(value: Any, annotation: Any) -> Any:
    if annotation is bool:
        if isinstance(value, bool):
            return value
        raise Mismatch
    if annotation in (int, float):
        number = value
        if isinstance(number, str):
            try:
                number = float(number)
            except ValueError:
                raise Mismatch from None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise Mismatch
        if annotation is float:
            return float(number)
        if isinstance(number, float) and not number.is_integer():
            raise Mismatch
        return int(number)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        try:
            return annotation(value).value
        except ValueError:
            raise Mismatch from None
    if isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise Mismatch


def describe(annotation: Any) -> str:
    """An annotation in plain words, for error messages."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "a mapping",
        list: "a list",
        type(None): "null",
        None: "null",
    }
    if annotation in words:
        return words[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(a) for a in arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is list:
        return f"a list of {describe(arguments[0])} each" if arguments else "a list"
    if origin is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    return getattr(annotation, "__name__", str(annotation))

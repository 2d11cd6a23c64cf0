"""Operators of ``torch.library`` whose schemas are the fields of their calls.

A call is one ``NamedTuple``. A call that holds another one, as a backward pass holds its forward pass,
has that one's fields in its place; it holds one at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast, get_args, get_type_hints

import torch
from torch import Tensor

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "int",
    bool: "bool",
    str: "str",
    tuple[bool, ...]: "bool[]",
}

# What each operator runs on its devices, by name, for those who look inside.
implementations: dict[str, Callable[..., Any]] = {}

C = TypeVar("C", bound=tuple[Any, ...])


def register(
    name: str,
    run: Callable[[C], Any],
    fake: Callable[[C], Any],
    devices: str | tuple[str, ...] = ("cpu", "cuda"),
) -> Any:
    """Make and return ``torch.ops.quietstar.<name>``, which takes the fields of a call one by one.

    Args:
        run: the implementation; the annotations of its parameter and result are the schema.
        fake: the shapes of the results.
    """
    full = f"quietstar::{name}"
    hints = get_type_hints(run)
    returns = _returns(hints.pop("return"))
    (call,) = hints.values()
    build = _builder(call)
    torch.library.define(full, f"({', '.join(_arguments(call))}) -> {returns}")
    whole = functools.partial(tuple.__new__, call)  # half the time of the constructor
    if call._field_defaults or build is not call:
        implementations[full] = lambda *values: run(build(*values))
    else:
        implementations[full] = lambda *values: run(whole(values))
    torch.library.impl(full, devices)(implementations[full])
    torch.library.register_fake(full, lambda *values, **named: fake(build(*values, **named)))
    return getattr(torch.ops.quietstar, name).default


def _returns(kind: Any) -> str:
    """Of a tensor, a list of them, a tuple, or a ``NamedTuple``."""
    if kind in (Tensor, list[Tensor]):
        return "Tensor" if kind is Tensor else "Tensor[]"
    count = len(getattr(kind, "_fields", get_args(kind)))
    return f"({', '.join(['Tensor'] * count)})"


def _arguments(call: type[C]) -> Iterator[str]:
    for name, kind in get_type_hints(call).items():
        if hasattr(kind, "_fields"):
            yield from _arguments(kind)
        else:
            default = call._field_defaults.get(name, ...)  # type: ignore[attr-defined]
            yield f"{_TYPES[kind]} {name}" + ("" if default is ... else f"={default!r}")


def _builder(call: type[C]) -> Callable[..., C]:
    """What makes a call of its flat fields."""
    kinds = list(get_type_hints(call).values())
    held = next((kind for kind in kinds if hasattr(kind, "_fields")), None)
    if held is None:
        return call
    at, make = kinds.index(held), cast(Callable[..., C], call)
    stop = at + len(held._fields)
    whole = functools.partial(tuple.__new__, held)
    return lambda *values, **named: make(*values[:at], whole(values[at:stop]), *values[stop:], **named)

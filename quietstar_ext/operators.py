"""Operators of ``torch.library`` whose schemas are the fields of their calls.

A call is one ``NamedTuple``. A call that holds another one, as a backward pass holds its forward pass,
has that one's fields in its place; it holds one at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast, get_type_hints

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
    call: type[C],
    returns: str,
    run: Callable[[C], Any],
    fake: Callable[[C], Any],
    devices: str | tuple[str, ...] = ("cpu", "cuda"),
) -> Any:
    """Make and return ``torch.ops.quietstar.<name>``, which takes the fields of ``call`` one by one.

    Args:
        returns: in the schema's words, as ``"(Tensor out, Tensor lse)"``.
        run, fake: the implementation, and the shapes of its results; both take the call.
    """
    full = f"quietstar::{name}"
    build = _builder(call)
    torch.library.define(full, f"({', '.join(_arguments(call))}) -> {returns}")
    whole = functools.partial(tuple.__new__, call)  # half the time of the constructor
    if call._field_defaults or build is not call:  # type: ignore[attr-defined]
        implementations[full] = lambda *values: run(build(*values))
    else:
        implementations[full] = lambda *values: run(whole(values))
    torch.library.impl(full, devices)(implementations[full])
    torch.library.register_fake(full, lambda *values, **named: fake(build(*values, **named)))
    return getattr(torch.ops.quietstar, name).default


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
    return lambda *values, **named: make(*values[:at], held(*values[at:stop]), *values[stop:], **named)

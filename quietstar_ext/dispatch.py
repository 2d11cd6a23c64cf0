"""Which implementation of an operator runs.

Every operator exists twice: ``fused`` (a kernel) and ``reference`` (plain PyTorch). The public
functions take ``impl="auto" | "fused" | "reference"``; ``auto`` takes the fused one where it can and
says once, in one line, when it cannot. ``fused`` never falls back: it raises instead, so that a test
or a benchmark that asks for the kernel knows that it got it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import torch

logger = logging.getLogger("quietstar_ext")

IMPLEMENTATIONS = ("auto", "fused", "reference")

_default = os.environ.get("QUIETSTAR_IMPL", "auto")
_said: set[tuple[str, str]] = set()


class Setting:
    """One of a few words: for a process by an environment variable, inside a block by :meth:`use`."""

    def __init__(self, variable: str, options: tuple[str, ...]):
        """The first of ``options`` is the default."""
        self.variable, self.options = variable, options
        self._value = os.environ.get(variable, options[0])

    def get(self) -> str:
        """The word; ``ValueError`` where the environment has another."""
        return self._check(self._value)

    def _check(self, value: str) -> str:
        if value not in self.options:
            raise ValueError(f"{self.variable} is {value!r}; expected one of {', '.join(self.options)}")
        return value

    @contextlib.contextmanager
    def use(self, value: str) -> Iterator[None]:
        """Set it inside the block."""
        previous, self._value = self._value, self._check(value)
        try:
            yield
        finally:
            self._value = previous


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Let every call inside the block that leaves ``impl`` at ``"auto"`` use ``impl`` instead.

    The environment variable ``QUIETSTAR_IMPL`` sets the same default for a whole process.
    """
    global _default
    _check(impl)
    previous, _default = _default, impl
    try:
        yield
    finally:
        _default = previous


def choose_impl(operator: str, impl: str, unsupported_reason: str | None) -> str:
    """Return ``"fused"`` or ``"reference"``.

    ``unsupported_reason`` is None where the fused kernel can take this call, otherwise half a sentence.
    Raises ``ValueError`` for an unknown ``impl`` and ``RuntimeError`` when ``"fused"`` was
    asked for and cannot be had.
    """
    _check(impl)
    if impl == "auto":
        impl = _default
        _check(impl)
    if impl == "reference":
        return "reference"
    if unsupported_reason is None:
        return "fused"
    if impl == "fused":
        raise RuntimeError(f"{operator}: impl='fused' cannot be used here: {unsupported_reason}")
    if not torch.compiler.is_compiling() and (operator, unsupported_reason) not in _said:
        _said.add((operator, unsupported_reason))
        logger.warning("%s: using the PyTorch reference: %s", operator, unsupported_reason)
    return "reference"


def _check(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}")

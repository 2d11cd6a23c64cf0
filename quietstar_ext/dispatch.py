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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from quietstar_ext import call_log
from quietstar_ext.checks import check_option

logger = logging.getLogger("quietstar_ext")

IMPLEMENTATIONS = ("auto", "fused", "reference")

_said: set[tuple[str, str]] = set()


class Setting:
    """One of a few words: for a process by an environment variable, inside a block by :meth:`use`."""

    def __init__(self, variable: str, options: tuple[str, ...]):
        """The first of ``options`` is the default."""
        self.variable, self.options = variable, options
        self._value = os.environ.get(variable, options[0])

    def get(self) -> str:
        """The word; ``ValueError`` where the environment has another."""
        check_option(self.variable, self._value, self.options)
        return self._value

    @contextlib.contextmanager
    def use(self, value: str) -> Iterator[None]:
        """Set it inside the block."""
        check_option(self.variable, value, self.options)
        previous, self._value = self._value, value
        try:
            yield
        finally:
            self._value = previous


_impl = Setting("QUIETSTAR_IMPL", IMPLEMENTATIONS)


def use_impl(impl: str) -> contextlib.AbstractContextManager[None]:
    """Let every call inside the block that leaves ``impl`` at ``"auto"`` use ``impl`` instead.

    The environment variable ``QUIETSTAR_IMPL`` sets the same default for a whole process.
    """
    check_option("impl", impl, IMPLEMENTATIONS)
    return _impl.use(impl)


def choose_impl(
    operator: str,
    impl: str,
    unsupported_reason: str | None,
    call: tuple[Any, ...] | None = None,
    *,
    kernel: Callable[[], str] | None = None,
    **tensors: Tensor | None,
) -> str:
    """Return ``"fused"`` or ``"reference"``, or what ``kernel`` says instead of ``"fused"``.

    ``unsupported_reason`` is None where the fused kernel can take this call, otherwise half a sentence.
    Raises ``ValueError`` for an unknown ``impl`` and ``RuntimeError`` when ``"fused"`` was
    asked for and cannot be had.

    Args:
        call: the arguments as a ``NamedTuple``, for the log of calls (call_log.py).
        kernel: which of several kernels, where one can take the call.
        tensors: arguments for the log that ``call`` does not hold.
    """
    chosen, reason = _choose(operator, impl, unsupported_reason)
    if chosen == "fused" and kernel is not None:
        chosen = kernel()
    if call_log.level:  # almost never; this test is what the log costs then
        fields: tuple[str, ...] = () if call is None else call._fields  # type: ignore[attr-defined]
        named = (*zip(fields, call or (), strict=True), *tensors.items())
        call_log.record(operator, chosen, reason, named)
    return chosen


def _choose(operator: str, impl: str, unsupported_reason: str | None) -> tuple[str, str | None]:
    """``"fused"`` or ``"reference"``, and why the latter where it was not asked for."""
    check_option("impl", impl, IMPLEMENTATIONS)
    if impl == "auto":
        impl = _impl.get()
    if impl == "reference":
        return "reference", None
    if unsupported_reason is None:
        return "fused", None
    if impl == "fused":
        raise RuntimeError(f"{operator}: impl='fused' cannot be used here: {unsupported_reason}")
    if not torch.compiler.is_compiling() and (operator, unsupported_reason) not in _said:
        _said.add((operator, unsupported_reason))
        logger.warning("%s: using the PyTorch reference: %s", operator, unsupported_reason)
    return "reference", unsupported_reason

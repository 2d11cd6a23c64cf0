"""A log of the operators' calls, on request: ``QUIETSTAR_LOG``.

``QUIETSTAR_LOG=1`` writes a line to stderr for each kind of call when it is first made, ``2`` one for
every call::

    quietstar_ext: linear_cross_entropy fused (avx512) on cpu: hidden float32 [512, 256] grad, weight ...

with the operator, the implementation that was taken (``fused`` with the CPU's instruction set,
``composed``, or ``reference`` and why), and the tensors; ``grad`` marks those that want one. Calls
are of one kind where operator, implementation, device, dtypes and gradients are the same and each size
lies between the same two powers of two, so that a text that grows does not write a line per token.

What runs without Python writes nothing: inside ``torch.compile``, and in the replays of a CUDA graph,
whose calls are logged when it is captured.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quietstar_ext.checks import check_option, dtype_name
from quietstar_ext.native import native, takes_cuda_path

VARIABLE = "QUIETSTAR_LOG"
LEVELS = ("0", "1", "2")

_seen: set[tuple[Any, ...]] = set()


def asked_level() -> int:
    """What the environment asks for; ``ValueError`` where that is no level."""
    asked = os.environ.get(VARIABLE) or "0"
    check_option(f"environment variable {VARIABLE}", asked, LEVELS)
    return int(asked)


level = asked_level()


class _Stderr(logging.StreamHandler[Any]):
    """Whatever stderr is when a line is written. It is asked for by a variable of the environment, so it
    is shown whether or not the program has set up logging."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        rank = os.environ.get("RANK")  # of several processes that write to one screen
        self.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s" if rank else "%(message)s"))

    @property
    def stream(self) -> Any:
        return sys.stderr


logger = logging.getLogger("quietstar_ext.calls")
logger.setLevel(logging.INFO)
logger.propagate = False
logger.addHandler(_Stderr())


def record(
    operator: str, chosen: str, reason: str | None, tensors: Iterable[tuple[str, object]]
) -> None:
    """Write a line about one call, unless its kind was logged and level is 1.

    Args:
        chosen: ``"fused"``, ``"composed"`` or ``"reference"``.
        reason: why no kernel could take the call, or None.
        tensors: the arguments by name; what is no tensor is left out.
    """
    if torch.compiler.is_compiling():
        return
    given = [_Given(name, tensor) for name, tensor in tensors if isinstance(tensor, Tensor)]
    first = given[0].tensor
    if level == 1:
        kind = (operator, chosen, reason, first.device, *(each.kind() for each in given))
        if kind in _seen:
            return
        _seen.add(kind)
    if chosen == "reference":
        detail = f" ({reason or 'asked for'})"
    else:
        detail = "" if takes_cuda_path(first) else f" ({native().build_info()['simd']})"
    words = ", ".join(map(str, given))
    logger.info("quietstar_ext: %s %s%s on %s: %s", operator, chosen, detail, first.device, words)


class _Given(NamedTuple):
    """A tensor argument."""

    name: str
    tensor: Tensor

    def wants_gradient(self) -> bool:
        return self.tensor.requires_grad and torch.is_grad_enabled()

    def kind(self) -> tuple[Any, ...]:
        sizes = tuple(size.bit_length() for size in self.tensor.shape)
        return self.name, self.tensor.dtype, self.wants_gradient(), sizes

    def __str__(self) -> str:
        grad = " grad" if self.wants_gradient() else ""
        return f"{self.name} {dtype_name(self.tensor.dtype)} {list(self.tensor.shape)}{grad}"

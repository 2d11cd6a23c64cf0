"""Calls of linear_cross_entropy."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from quietstar_ext.linear_cross_entropy.softmax import SoftmaxCrossEntropy

TENSORS = 4


class LinearCrossEntropy(NamedTuple):
    """Arguments of the public function, checked; the fields that are tensors come first."""

    hidden: Tensor  # [rows, d]
    weight: Tensor  # [V, d]
    targets: Tensor  # [rows] int64
    banned: Tensor | None  # [n] int64
    temperature: float
    ignore_index: int
    softcap: float | None
    logit_scale: float

    def softmax(self) -> SoftmaxCrossEntropy:
        """The step between the products."""
        return SoftmaxCrossEntropy(
            self.hidden, self.banned, self.temperature, self.softcap, self.logit_scale
        )


class WithGradients(NamedTuple):
    """The losses, and the gradients of their sum with these weights."""

    forward: LinearCrossEntropy
    row_weights: Tensor  # [rows]
    skip_zero_weight: bool
    want_hidden: bool
    want_weight: bool
    accumulate: str = "auto"


class LinearCrossEntropyBackward(NamedTuple):
    """The gradients of the sum with the weights ``grad``, where those for equal ones may be there.

    unit_hidden, unit_weight: those of Σ nll, which are overwritten and returned; None where they are
    gone and everything is computed again.
    """

    forward: LinearCrossEntropy
    grad: Tensor  # [rows]
    unit_hidden: Tensor | None  # as hidden
    unit_weight: Tensor | None  # as weight
    want_hidden: bool
    want_weight: bool
    accumulate: str = "auto"


class Products(NamedTuple):
    """What is left to compute: chunks of the rows that count, with or without gradients."""

    hidden: Tensor  # [rows, d]
    weight: Tensor  # [V, d]
    targets: Tensor  # [rows] int64
    row_weights: Tensor | None  # [rows] float32 or wider; None: losses, and no gradient is wanted
    valid_rows: Tensor  # [rows] bool
    softmax: SoftmaxCrossEntropy
    want_hidden: bool
    want_weight: bool
    accumulate: str = "auto"


class Losses(NamedTuple):
    """Results; the gradients are empty where they are not wanted."""

    nll: Tensor  # [rows]
    grad_hidden: Tensor  # as hidden
    grad_weight: Tensor  # as weight, in its ``gradient_dtype``

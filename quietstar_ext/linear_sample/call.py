"""A call of linear_sample."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quietstar_ext.sample_tokens.call import SampleTokens


class LinearSample(NamedTuple):
    """Arguments of the public function, checked; from temperature to offset those of sample_tokens."""

    hidden: torch.Tensor  # [rows, d]
    weight: torch.Tensor  # [vocab, d]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    banned: torch.Tensor | None  # [n] int64
    seed: torch.Tensor  # [1] int64
    offset: int
    softcap: float | None
    logit_scale: float
    fused: bool  # the kernel, or the reference

    def of_logits(self, logits: torch.Tensor, first_row: int = 0) -> SampleTokens:
        """The call of sample_tokens for the logits [rows, vocab] of the rows from ``first_row`` on."""
        return SampleTokens(logits, *self[2:8], self.offset + first_row, self.fused)

"""The step of linear_cross_entropy between its matrix products: the kernel, and the same in PyTorch."""

from __future__ import annotations

import torch

from quietstar_ext.native import fields, native, native_unsupported_reason
from quietstar_ext.precision import compute_dtype


class SoftmaxCrossEntropy:
    """Loss and, in the same memory, gradient of chunks of logits [rows, V], by the kernel or in PyTorch.

    ``fused`` says which: the kernel, wherever it takes hidden's device and dtype. Logits then have the
    strides (1, at least rows).

    Args:
        hidden: what the logits are made of.
        banned: [n] int64, or None.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        banned: torch.Tensor | None,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
    ):
        self.banned = None if banned is None else banned.contiguous()
        self.temperature, self.softcap, self.logit_scale = temperature, softcap, logit_scale
        self.fused = native_unsupported_reason(hidden) is None

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """nll, and the largest logit and the sum of exponentials below it that ``gradient_`` takes.

        Args:
            logits: [rows, V], raw products; unchanged.
            targets: [rows] int64, all in 0 .. V-1.

        Returns:
            three tensors [rows] in float32 (float64 for float64).
        """
        if self.fused:
            nll, largest, total = logits.new_empty(3, logits.shape[0], dtype=torch.float32).unbind(0)
            self._call("loss", logits, targets, 0, (largest, total, nll, None))
            return nll, largest, total
        y, _ = self.scaled(logits)
        largest = y.amax(1)
        total = (y - largest[:, None]).exp().sum(1)
        return total.log() + (largest - y.gather(1, targets[:, None])[:, 0]), largest, total

    def gradient_(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        row_weights: torch.Tensor,
        largest: torch.Tensor,
        total: torch.Tensor,
        first_token: int = 0,
    ) -> None:
        """Overwrite the logits with the gradient of Σ row_weights · nll for the raw products.

        The logits may be those of a part of the vocabulary that begins at ``first_token`` (kernel only).
        """
        if self.fused:
            self._call("gradient", logits, targets, first_token, (largest, total, None, row_weights))
            return
        y, slope = self.scaled(logits)
        # A banned target is a constant (-inf): only the log-sum-exp has a gradient then.
        one = (y.gather(1, targets[:, None]) != -torch.inf).to(y.dtype)
        p = (y - largest[:, None]).exp() / total[:, None]
        p.scatter_add_(1, targets[:, None], -one)
        logits.copy_(p * slope * row_weights[:, None])

    def scaled(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The logits of the softmax, and their derivative with respect to the raw products."""
        x = logits.to(compute_dtype(logits.dtype)) * self.logit_scale
        slope: torch.Tensor | float = self.logit_scale / self.temperature
        if self.softcap is not None:
            x = torch.tanh(x / self.softcap)
            slope = slope * (1 - x.square())
            x *= self.softcap
        x /= self.temperature
        return (x if self.banned is None else x.index_fill_(1, self.banned, -torch.inf)), slope

    def _call(
        self,
        step: str,
        logits: torch.Tensor,
        targets: torch.Tensor,
        first_token: int,
        of_rows: tuple[torch.Tensor | None, ...],
    ) -> None:
        """Run the kernel; ``of_rows`` are largest, total, nll (for loss), row_weights (for gradient)."""
        rows, vocab = logits.shape
        size = native().softmax_cross_entropy_workspace(rows, vocab)
        workspace = torch.empty(size, dtype=torch.uint8)
        banned, (largest, total, nll, row_weights) = self.banned, of_rows
        getattr(native(), f"softmax_cross_entropy_{step}")(
            fields(
                *(logits, logits.dtype, rows, vocab, max(rows, logits.stride(1)), targets),
                *(self.temperature, self.softcap, self.logit_scale, nll, row_weights, first_token),
                *(banned, 0 if banned is None else banned.numel(), largest, total, workspace),
                *(torch.get_num_threads(), None, None),
            )
        )

"""The decoder's output layer: its logits, losses, entropies and samples.

An ordinary layer is its weight, and the fused operators take it. Any other (with an adapter, quantised,
with a bias or a hook; :mod:`quietstar.thinking.linear_layers`) is called, chunk of rows by chunk of
rows, so that here, too, rows x vocabulary are never held; the backward pass calls it again.
"""

from __future__ import annotations

from copy import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from quietstar.thinking.linear_layers import call_linear, is_plain_linear
from quietstar.thinking.text_part import text_config_of
from quietstar_ext import (
    checks,
    linear_cross_entropy,
    linear_cross_entropy_sum,
    linear_sample,
    sample_tokens,
)
from quietstar_ext.aligned_products import linear_logits
from quietstar_ext.linear_entropy import linear_entropy_sum
from quietstar_ext.precision import autocast_inputs, compute_dtype

IGNORE = -100
# Logits of a called layer in fp32 at a time. A quantised one unpacks its whole weight for every chunk.
CHUNK_BYTES = 128 * 2**20
# What others divide their logits by (``logits_scaling``), these multiply them with.
_MULTIPLIES_LOGITS = ("hyperclovax",)


class OutputLayer:
    """The output layer as the operators take it: logits = softcap(h W^T * logit_scale) / temperature.

    Hidden states come in any floating dtype, and are cast to the weight's.

    Args:
        weight: [V, d].
    """

    temperature: float = 1.0
    banned: Tensor | None = None

    def __init__(self, weight: Tensor, softcap: float | None, logit_scale: float):
        self.weight, self.softcap, self.logit_scale = weight, softcap, logit_scale

    def at(self, temperature: float, banned: Tensor | None = None) -> Self:
        """The same layer, whose losses, entropies and samples are those of a temperature, and of all
        tokens but the banned ones (int64 ids)."""
        other = copy(self)
        other.temperature, other.banned = temperature, banned
        return other

    def for_draws(self) -> Self:
        """The same layer for the samples of one rollout, without gradients: under autocast its weight is
        cast here, once, and not in every call. For no longer than the weights stay as they are."""
        other = copy(self)
        (other.weight,) = autocast_inputs(self.weight.detach())
        return other

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V] at temperature 1; only for rows that a caller really asked to see."""
        operands = self._operands(hidden)
        if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
            return self._shape(operands[0] @ self.weight.T)
        return self._shape(linear_logits(*operands))

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """nll [rows] of hidden [rows, d] and targets [rows], 0 where a target is -100
        (:func:`quietstar_ext.linear_cross_entropy`)."""
        return linear_cross_entropy(
            *self._operands(hidden), targets, ignore_index=IGNORE, **self._options()
        )

    def cross_entropy_sum(
        self, hidden: Tensor, targets: Tensor, row_weights: Tensor, skip_zero_weight: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The sum of row_weights [rows] times nll, with its gradient, and nll [rows] without
        (:func:`quietstar_ext.linear_cross_entropy_sum`)."""
        return linear_cross_entropy_sum(
            *self._operands(hidden),
            targets,
            row_weights,
            ignore_index=IGNORE,
            skip_zero_weight=skip_zero_weight,
            **self._options(),
        )

    def entropy_sum(self, hidden: Tensor, row_weights: Tensor) -> Tensor:
        """The sum of row_weights [rows] times the rows' entropies in nats
        (:func:`quietstar_ext.linear_entropy.linear_entropy_sum`)."""
        return linear_entropy_sum(*self._operands(hidden), row_weights, **self._options())

    def sample(self, hidden: Tensor, seed: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """One token for every row: tokens [rows] int64 and their log-probabilities [rows] fp32
        (:func:`quietstar_ext.linear_sample`)."""
        return linear_sample(*self._operands(hidden), seed=seed, offset=offset, **self._options())

    def _operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.to(self.weight.dtype), self.weight

    def _options(self) -> dict[str, Any]:
        shape = {"softcap": self.softcap, "logit_scale": self.logit_scale}
        return {"temperature": self.temperature, "banned": self.banned, **shape}

    def _shape(self, product: Tensor) -> Tensor:
        logits = product * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class CalledOutputLayer(OutputLayer):
    """An output layer that is more than its weight: called, in chunks of rows.

    Args:
        layer: [..., d] -> [..., V].
        vocabulary: V.
    """

    def __init__(self, layer: nn.Module, vocabulary: int, softcap: float | None, logit_scale: float):
        self.layer, self.vocabulary = layer, vocabulary
        self.softcap, self.logit_scale = softcap, logit_scale

    def for_draws(self) -> Self:
        """Itself: the layer casts by itself, and autocast keeps what it cast of weights that learn."""
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        return self._shape(call_linear(self.layer, hidden))

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        checks.check_index_range("targets", targets, self.vocabulary, also=IGNORE)

        def losses(hidden: Tensor, targets: Tensor) -> Tensor:
            return -self._log_softmax(hidden).gather(1, targets[:, None])[:, 0]

        return self._over_rows(losses, (targets != IGNORE).nonzero()[:, 0], hidden, targets)

    def cross_entropy_sum(
        self, hidden: Tensor, targets: Tensor, row_weights: Tensor, skip_zero_weight: bool = True
    ) -> tuple[Tensor, Tensor]:
        weightless = row_weights == 0
        if skip_zero_weight:
            targets = targets.masked_fill(weightless, IGNORE)
        nll = self.cross_entropy(hidden, targets)
        # The nll of a banned target is inf, which a weight of 0 would make NaN.
        weighted = row_weights.detach().to(nll.dtype) * nll.masked_fill(weightless, 0)
        return weighted.sum(), nll.detach()

    def entropy_sum(self, hidden: Tensor, row_weights: Tensor) -> Tensor:
        def entropies(hidden: Tensor) -> Tensor:
            logp = self._log_softmax(hidden)
            return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(1)

        entropy = self._over_rows(entropies, row_weights.nonzero()[:, 0], hidden)
        return row_weights.detach().to(entropy.dtype) @ entropy

    @torch.no_grad()
    def sample(self, hidden: Tensor, seed: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        size = self._rows_per_chunk(hidden)
        drawn = [
            sample_tokens(
                self._shape(call_linear(self.layer, rows).float()),
                temperature=self.temperature,
                banned=self.banned,
                seed=seed,
                offset=offset + index * size,
            )
            for index, rows in enumerate(hidden.split(size))
        ]
        return torch.cat([tokens for tokens, _ in drawn]), torch.cat([logp for _, logp in drawn])

    def _log_softmax(self, hidden: Tensor) -> Tensor:
        product = call_linear(self.layer, hidden)
        logits = self._shape(product.to(compute_dtype(product.dtype))) / self.temperature
        if self.banned is not None:
            logits = logits.index_fill(1, self.banned, -torch.inf)
        return logits.log_softmax(1)

    def _rows_per_chunk(self, hidden: Tensor) -> int:
        return max(1, CHUNK_BYTES // (self.vocabulary * compute_dtype(hidden.dtype).itemsize))

    def _zeros(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(len(hidden), dtype=compute_dtype(hidden.dtype))

    def _over_rows(self, function: Any, valid_rows: Tensor, hidden: Tensor, *more: Tensor) -> Tensor:
        """``function`` of the valid rows' tensors, [rows], 0 for the other rows."""
        if not len(valid_rows) and len(hidden) and torch.is_grad_enabled():
            # Nothing counts here, but another process may wait for the layer's gradients: zeros.
            rows = [tensor[:1] for tensor in (hidden, *more)]
            rows[1:] = [tensor.clamp(min=0) for tensor in rows[1:]]
            return function(*rows).nan_to_num(0, 0, 0).sum() * 0 + self._zeros(hidden)
        if not len(valid_rows):
            return self._zeros(hidden)
        found = []
        for index in valid_rows.split(self._rows_per_chunk(hidden)):
            rows = [tensor[index] for tensor in (hidden, *more)]
            if torch.is_grad_enabled():
                found.append(checkpoint(function, *rows, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(function(*rows))
        values = torch.cat(found)
        return values.new_zeros(len(hidden)).index_put((valid_rows,), values)


def output_layer(decoder: PreTrainedModel) -> OutputLayer:
    """Read the output layer and what a family does to its logits."""
    config = text_config_of(decoder.config)
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    if scaling := getattr(config, "logits_scaling", None):
        scale = scaling if config.model_type in _MULTIPLIES_LOGITS else 1.0 / scaling
    scale = 1.0 if scale is None else float(scale)
    softcap = getattr(config, "final_logit_softcapping", None)
    layer = decoder.get_output_embeddings()
    if is_plain_linear(layer) and layer.bias is None:
        return OutputLayer(layer.weight, softcap, scale)
    return CalledOutputLayer(layer, config.vocab_size, softcap, scale)

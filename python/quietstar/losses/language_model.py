"""Talk: mix each prediction with the one made after a thought, and compare both with the true text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.thinking.decoder import ThoughtDecoder
from quietstar.thinking.output_layer import IGNORE
from quietstar.thinking.text_batch import TextBatch


@dataclass
class LanguageModelLosses:
    """Losses per token; entries without a target are zero.

    Attributes:
        nll: scalar, w·base + (1-w)/K · sum of the talk steps' means, with its gradient.
        base_losses: [B, N-1] fp32, no gradient (as all below).
        talk_losses: [K, B, A, R] fp32.
        base_loss: scalar mean; talk_loss: [K] means.
        mixing_weight: [K, B, A, R] fp32.
    """

    nll: Tensor
    base_losses: Tensor
    talk_losses: Tensor
    base_loss: Tensor
    talk_loss: Tensor
    mixing_weight: Tensor


def text_losses(td: ThoughtDecoder, batch: TextBatch, text: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the base prediction alone, of a model without thoughts.

    Args:
        text: [B, N, d].

    Returns:
        the mean over tokens that count, with its gradient, and the losses per token [B, N-1].
    """
    share = batch.is_target.float() / batch.target_divisors
    loss, losses = td.output.cross_entropy_sum(
        text[:, :-1].flatten(0, 1), batch.targets.flatten(), share.flatten(), skip_zero_weight=False
    )
    return loss, losses.view_as(batch.targets)


def language_model_losses(
    td: ThoughtDecoder, batch: TextBatch, text: Tensor, slots: Tensor
) -> LanguageModelLosses:
    """Mixed predictions of every talk step, their losses, and the base prediction's.

    Args:
        text: [B, N, d]; slots: [B, S, M, d].
    """
    k, weight = td.config.talk_length, td.config.base_loss_weight
    mixed, mixing_weight = td.mix(batch, text, slots)
    base_targets, targets, divide_by = batch.targets, batch.talk_targets, batch.target_divisors
    base_share = (weight / divide_by[0]).expand_as(base_targets)
    share = ((1 - weight) / k / divide_by[1:])[:, None, None].expand_as(targets)
    # One call for both predictions: the gradient of the vocabulary matrix is held once.
    hidden = torch.cat([text[:, :-1].flatten(0, 1), mixed.flatten(0, 2)])
    every = torch.cat([base_targets.flatten(), targets.flatten()])
    row_weights = torch.cat([base_share.flatten(), share.flatten()])
    nll, losses = td.output.cross_entropy_sum(
        hidden,
        every,
        torch.where(every != IGNORE, row_weights, 0.0),
        # A weight of zero (base_loss_weight 0 or 1) must not hide the losses from the reward.
        skip_zero_weight=False,
    )
    counts = batch.counts.clamp(min=1)
    base_losses = losses[: base_targets.numel()].view_as(base_targets)
    shape = (*batch.has_target.shape, batch.rationales)
    losses = losses[base_targets.numel() :].view(shape)
    return LanguageModelLosses(
        nll=nll,
        base_losses=base_losses,
        talk_losses=losses,
        base_loss=base_losses.sum() / counts[0],
        talk_loss=losses.sum((1, 2, 3)) / counts[1:],
        mixing_weight=mixing_weight.detach().float().view(shape),
    )

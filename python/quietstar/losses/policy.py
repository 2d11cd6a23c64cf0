"""Learn: reinforce the tokens of thoughts by what they earned, and add up the terms of the loss.

Formulas: Zelikman et al. 2024 (arXiv 2403.09629), sections 4.4.1 and 4.4.2, in the reading of the
reference implementation: the reward is summed over the talk steps, the baseline is the mean over the
rationales of a position, and only positive advantages count. Rewards are in
:mod:`quietstar.losses.rewards`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.config import QuietStarConfig
from quietstar.losses.rewards import ThoughtRewards
from quietstar.thinking.decoder import ThoughtDecoder
from quietstar.thinking.rollout import Thoughts
from quietstar.thinking.text_batch import TextBatch


def _scoring_rows(td: ThoughtDecoder, slots: Tensor) -> Tensor:
    """The slots [B, S, M, d] that thought tokens are drawn from, [B * M * T, d]."""
    return slots[:, : td.config.thought_length].transpose(1, 2).flatten(0, 2)


def _per_token(td: ThoughtDecoder, weights: Tensor) -> Tensor:
    """Weights [B, M] of thoughts as those of their tokens, [B * M * T]."""
    return weights[..., None].expand(-1, -1, td.config.thought_length).flatten()


def thought_logprobs(td: ThoughtDecoder, slots: Tensor, thought_ids: Tensor) -> Tensor:
    """Log-probability of every thought token at the REINFORCE temperature, [B, M, T].

    Args:
        slots: [B, S, M, d]; thought_ids: [B, M, T].
    """
    output = td.thought_output(td.config.reinforce_temperature, slots.device)
    nll = output.cross_entropy(_scoring_rows(td, slots), thought_ids.flatten())
    return -nll.view_as(thought_ids)


def policy_loss(
    td: ThoughtDecoder, batch: TextBatch, slots: Tensor, thoughts: Thoughts, reward: ThoughtRewards
) -> Tensor | None:
    """mean over the T thought tokens of -(A · logp).mean(), unweighted; None where nothing was sampled.

    The mean runs over all thoughts that count, those that earned nothing included; their rows need no
    vocabulary product and get none.

    Args:
        slots: [B, S, M, d].
    """
    config = td.config
    if thoughts.ids is None:
        return None
    weights = reward.advantage.flatten(1) / (batch.thought_divisor * config.thought_length)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.policy_weight > 0):
        loss, _ = td.thought_output(config.reinforce_temperature, slots.device).cross_entropy_sum(
            _scoring_rows(td, slots), thoughts.ids.flatten(), _per_token(td, weights)
        )
    return loss


def thought_entropy(
    td: ThoughtDecoder, batch: TextBatch, slots: Tensor, thoughts: Thoughts
) -> Tensor | None:
    """The mean entropy (nats) of what the tokens of rewarded thoughts are drawn from, with its gradient;
    None where nothing was sampled or no bonus is given for it.

    Args:
        slots: [B, S, M, d].
    """
    config = td.config
    if thoughts.ids is None or not config.entropy_bonus:
        return None
    weights = batch.rewarded.float() / batch.thought_divisor
    weights = weights.repeat_interleave(batch.rationales, dim=1) / config.thought_length
    # The most likely thought (temperature 0) has a distribution behind it all the same.
    output = td.thought_output(config.thought_temperature or 1.0, slots.device)
    return output.entropy_sum(_scoring_rows(td, slots), _per_token(td, weights))


@dataclass
class LossTerms:
    """A loss and its two parts, which a trainer may send back separately.

    Attributes:
        loss: language_loss + thinking_loss.
        language_loss: nll_weight · NLL, with its gradient.
        thinking_loss: policy_weight · policy - entropy_bonus · entropy, with its gradient; None where
            both weights are 0 or nothing was sampled.
    """

    loss: Tensor
    language_loss: Tensor
    thinking_loss: Tensor | None


def total_loss(
    config: QuietStarConfig, nll: Tensor, policy: Tensor | None, entropy: Tensor | None
) -> LossTerms:
    """The loss from its terms; ``policy`` and ``entropy`` are None where there is no such term."""
    language = nll if config.nll_weight == 1 else config.nll_weight * nll
    thinking = None
    if policy is not None and config.policy_weight:
        thinking = config.policy_weight * policy
    if entropy is not None:
        bonus = config.entropy_bonus * entropy
        thinking = -bonus if thinking is None else thinking - bonus
    loss = language if thinking is None else language + thinking
    return LossTerms(loss, language, thinking)

"""Learn: reward a thought for what it added to the truth's probability, and reinforce its tokens.

Formulas: Zelikman et al. 2024 (arXiv 2403.09629), sections 4.4.1 and 4.4.2, in the reading of the
reference implementation: the reward is summed over the talk steps, the baseline is the mean over the
rationales of a position, and only positive advantages count. What else a thought may be rewarded for is
in :mod:`quietstar.losses.rewards`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.config import QuietStarConfig
from quietstar.losses.language_model import Talk
from quietstar.losses.rewards import Objective, add_up, advantage_of, gains, thought_entropy
from quietstar.thinking.batch_share import WHOLE, BatchPart
from quietstar.thinking.layout import TextRanges
from quietstar.thinking.output_layer import Head
from quietstar.thinking.think import banned_ids


@dataclass
class Reward:
    """What each thought earned.

    Attributes:
        reward: [B, A, R] fp32, sum over talk steps of what ``config.reward`` says.
        advantage: [B, A, R] fp32, as ``config.advantage`` and ``clamp_advantage`` say.
        rewarded, averaged: [B, A] bool of :func:`which_count`.
    """

    reward: Tensor
    advantage: Tensor
    rewarded: Tensor
    averaged: Tensor


def which_count(
    config: QuietStarConfig, anchors: Tensor, has_target: Tensor, ranges: TextRanges
) -> tuple[Tensor, Tensor]:
    """The anchors whose thoughts are rewarded, and those that the policy term's mean is over.

    A thought counts if its anchor is text and at least one of the tokens that it is rewarded for is a
    target in its own document. With ``policy_mean: paper`` it counts if the row goes on for all of its
    talk steps, and the mean is over every such position of a row, padding included.

    Args:
        anchors: [B, A]; has_target: [K, B, A] bool of :class:`~quietstar.losses.language_model.Talk`.

    Returns:
        rewarded and averaged, [B, A] bool.
    """
    rewarded = has_target.any(0)
    if config.policy_mean == "rewarded":
        return rewarded, rewarded
    ahead = anchors + 1 + has_target.shape[0]
    complete = ahead < ranges.stop.shape[1]
    return rewarded & complete & ~ranges.crosses(anchors, ahead), complete


@torch.no_grad()
def reward_thoughts(
    config: QuietStarConfig,
    head: Head,
    talked: Talk,
    slot_hidden: Tensor,
    anchors: Tensor,
    ranges: TextRanges,
    baseline_losses: Tensor | None = None,
) -> Reward:
    """anchors [B, A] -> reward of each thought, the sum over the tokens that it is rewarded for.

    ``slot_hidden`` [B, S, A*R, d] and ``baseline_losses`` [B, N-1] as in
    :func:`quietstar.losses.rewards.gains`.
    """
    rewarded, averaged = which_count(config, anchors, talked.has_target, ranges)
    gained = gains(config, head, talked, slot_hidden, anchors, baseline_losses)
    reward = gained.sum(0) * rewarded[..., None]
    return Reward(reward, advantage_of(config, reward), rewarded, averaged)


def thought_logprobs(
    config: QuietStarConfig, head: Head, slot_hidden: Tensor, thought_ids: Tensor
) -> Tensor:
    """Log-probability of every thought token at the REINFORCE temperature, [B, M, T].

    Args:
        slot_hidden: [B, S, M, d]; thought_ids: [B, M, T].
    """
    scoring = slot_hidden[:, : config.thought_length].transpose(1, 2)
    nll = head.cross_entropy(
        scoring.flatten(0, 2),
        thought_ids.flatten(),
        temperature=config.reinforce_temperature,
        banned=banned_ids(config, thought_ids.device),
    )
    return -nll.view_as(thought_ids)


def policy_loss(
    config: QuietStarConfig,
    head: Head,
    slot_hidden: Tensor,
    thought_ids: Tensor,
    earned: Reward,
    count: Tensor,
) -> Tensor:
    """mean over the T thought tokens of -(A · logp).mean(), unweighted.

    The mean runs over all thoughts that count, those that earned nothing included; their rows need no
    vocabulary product and get none.

    Args:
        slot_hidden: [B, S, M, d]; thought_ids: [B, M, T], M = A*R with rationales as neighbours.
        count: of the thoughts that the mean is over, a scalar.
    """
    length = config.thought_length
    weights = earned.advantage.flatten(1) / (count * length)
    loss, _ = head.cross_entropy_sum(
        slot_hidden[:, :length].transpose(1, 2).flatten(0, 2),
        thought_ids.flatten(),
        weights[..., None].expand(-1, -1, length).flatten(),
        temperature=config.reinforce_temperature,
        banned=banned_ids(config, thought_ids.device),
        skip_zero_weight=True,
    )
    return loss


def learn(
    config: QuietStarConfig,
    head: Head,
    nll: Tensor,
    slot_hidden: Tensor,
    thought_ids: Tensor | None,
    earned: Reward,
    part: BatchPart = WHOLE,
) -> tuple[Objective, Tensor | None]:
    """All terms of the loss, and the policy term without a gradient.

    Args:
        nll: the language-model loss.
        slot_hidden: [B, S, M, d]; thought_ids: [B, M, T], None where nothing was sampled.
        part: which part of a larger batch this is; means over thoughts are over the larger one.
    """
    if thought_ids is None:
        return add_up(config, nll, None, None), None
    rationales = earned.advantage.shape[-1]
    count = part.mean_count("thoughts", earned.averaged.sum() * rationales)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.policy_weight > 0):
        policy = policy_loss(config, head, slot_hidden, thought_ids, earned, count)
    entropy = None
    if config.entropy_bonus:
        weights = earned.rewarded.float() / count
        entropy = thought_entropy(config, head, slot_hidden, weights, rationales)
    return add_up(config, nll, policy, entropy), policy.detach()

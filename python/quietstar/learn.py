"""Learn: reward a thought for what it added to the truth's probability, and reinforce its tokens.

Formulas: Zelikman et al. 2024 (arXiv 2403.09629), sections 4.4.1 and 4.4.2, in the reading of the
reference implementation: the reward is summed over the talk steps, the baseline is the mean over the
rationales of a position, and only positive advantages count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar_ext import linear_cross_entropy, linear_cross_entropy_sum

from .config import QuietStarConfig
from .talk import Talk
from .think import Head, banned_ids


@dataclass
class Reward:
    """What each thought earned.

    Attributes:
        reward: [B, A, R] fp32, sum over talk steps of base minus mixed loss.
        advantage: [B, A, R] fp32, reward less its mean over rationales, negatives set to 0.
        counts: [B, A] bool, anchors that have all their talk steps inside the text.
    """

    reward: Tensor
    advantage: Tensor
    counts: Tensor


@torch.no_grad()
def reward_thoughts(talked: Talk, anchors: Tensor, text_length: int) -> Reward:
    """anchors [B, A] -> reward of each thought; anchors too close to the end get none."""
    k = talked.talk_losses.shape[0]
    counts = anchors <= text_length - 2 - k
    steps = torch.arange(k, device=anchors.device)[:, None, None]
    spoken = (anchors[None] + steps).clamp(max=text_length - 2)
    base = talked.base_losses.expand(k, -1, -1).gather(2, spoken)
    gain = (base[..., None] - talked.talk_losses) * talked.has_target[..., None]
    reward = gain.sum(0) * counts[..., None]
    rationales = reward.shape[-1]
    centred = reward - reward.mean(-1, keepdim=True) if rationales > 1 else reward
    return Reward(reward, centred.clamp(min=0), counts)


def thought_logprobs(
    config: QuietStarConfig, head: Head, slot_hidden: Tensor, thought_ids: Tensor
) -> Tensor:
    """Log-probability of every thought token at the REINFORCE temperature, [B, M, T].

    Args:
        slot_hidden: [B, S, M, d]; thought_ids: [B, M, T].
    """
    scoring = slot_hidden[:, : config.thought_length].transpose(1, 2)
    nll = linear_cross_entropy(
        scoring.flatten(0, 2).to(head.weight.dtype),
        head.weight,
        thought_ids.flatten(),
        temperature=config.reinforce_temperature,
        banned=banned_ids(config, thought_ids.device),
        **head.options(),
    )
    return -nll.view_as(thought_ids)


def policy_loss(
    config: QuietStarConfig, head: Head, slot_hidden: Tensor, thought_ids: Tensor, earned: Reward
) -> Tensor:
    """mean over the T thought tokens of -(A · logp).mean(), unweighted.

    The mean runs over all thoughts that can earn something, those that did not included; their rows
    need no vocabulary product and get none.

    Args:
        slot_hidden: [B, S, M, d]; thought_ids: [B, M, T], M = A*R with rationales as neighbours.
    """
    rationales = earned.advantage.shape[-1]
    total = (earned.counts.sum() * rationales).clamp(min=1) * config.thought_length
    weights = earned.advantage.flatten(1) / total
    length = config.thought_length
    loss, _ = linear_cross_entropy_sum(
        slot_hidden[:, :length].transpose(1, 2).flatten(0, 2).to(head.weight.dtype),
        head.weight,
        thought_ids.flatten(),
        weights[..., None].expand(-1, -1, length).flatten(),
        temperature=config.reinforce_temperature,
        banned=banned_ids(config, thought_ids.device),
        skip_zero_weight=True,
        **head.options(),
    )
    return loss

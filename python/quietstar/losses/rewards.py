"""Objective: which gain a thought is rewarded for, what counts as an advantage, the terms of the loss.

Rewards, per thought and summed over the talk steps (all losses are cross entropies of the true token):

- ``mixture-gain``: base loss - loss of the mixed prediction. Zelikman et al. 2024 (arXiv 2403.09629).
- ``base-gain``: base loss - loss of the thought's own prediction, as if the mixing weight were 1. The
  mixture's reward is scaled by the mixing weight and vanishes with it; this one does not, so thoughts
  are told apart before the mixing head listens to any. It asks more of them, too: the NLL trains
  the mixture, and the thought's own prediction only through it.
- ``information-gain``: the same with the base loss of an exponential moving average of the model, that
  lags behind: Hatamizadeh et al. 2025 (RLP, arXiv 2510.01265, equations 3 to 5).

Advantages, over the R thoughts of a position with rewards r_1 .. r_R:

- ``mean``: r - mean(r). ``leave-one-out``: R/(R-1) times that, which is r less the mean of the other
  thoughts (RLP, equation 7). ``normalized``: (r - mean(r)) / (std(r) + 1e-4), std with divisor R, as in
  GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).
- One thought alone has the reward itself. ``clamp_advantage`` then drops what is negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quietstar.config import QuietStarConfig
from quietstar.losses.language_model import Talk
from quietstar.thinking.output_layer import Head
from quietstar.thinking.think import banned_ids, depth_of_end

# Rewards that hardly differ are not blown up to advantages of 1.
STD_FLOOR = 1e-4


@torch.no_grad()
def gains(
    config: QuietStarConfig,
    head: Head,
    talked: Talk,
    slot_hidden: Tensor,
    anchors: Tensor,
    baseline_losses: Tensor | None = None,
) -> Tensor:
    """What each talk step of each thought gained, [K, B, A, R] fp32; 0 where there is no target.

    Args:
        slot_hidden: [B, S, A*R, d]; anchors: [B, A].
        baseline_losses: [B, N-1], the copy's base losses for ``information-gain``; None: the model's
            own, which equal the copy's before the first step.
    """
    before = talked.base_losses
    if config.reward == "information-gain" and baseline_losses is not None:
        before = baseline_losses.to(before.dtype)
    k, last = talked.talk_losses.shape[0], before.shape[1]
    steps = torch.arange(k, device=anchors.device)[:, None, None]
    before = pad(before, (0, 1)).expand(k, -1, -1).gather(2, (anchors[None] + steps).clamp(max=last))
    after = talked.talk_losses
    if config.reward != "mixture-gain":
        after = thought_losses(config, head, slot_hidden, talked.targets).view_as(after)
    return (before[..., None] - after) * talked.has_target[..., None]


@torch.no_grad()
def thought_losses(config: QuietStarConfig, head: Head, slot_hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the thought's own prediction, [K, B, M] fp32; one vocabulary product.

    Args:
        slot_hidden: [B, S, M, d]; targets: [K, B, M] int64, -100 where there is none.
    """
    first = depth_of_end(config) - 1
    own = slot_hidden[:, first : first + targets.shape[0]].transpose(0, 1)
    nll = head.cross_entropy(own.flatten(0, 2), targets.flatten())
    return nll.view(targets.shape)


def advantage_of(config: QuietStarConfig, reward: Tensor) -> Tensor:
    """Rewards [..., R] to advantages [..., R]."""
    rationales = reward.shape[-1]
    if rationales > 1:
        if config.advantage == "normalized":
            spread = reward.std(-1, correction=0, keepdim=True) + STD_FLOOR
        reward = reward - reward.mean(-1, keepdim=True)
        if config.advantage == "normalized":
            reward = reward / spread
        elif config.advantage == "leave-one-out":
            reward = reward * (rationales / (rationales - 1))
    return reward.clamp(min=0) if config.clamp_advantage else reward


def thought_entropy(
    config: QuietStarConfig, head: Head, slot_hidden: Tensor, weights: Tensor, rationales: int
) -> Tensor:
    """Weighted entropy (nats) of what thought tokens are sampled from, the mean over the T tokens of a
    thought; a scalar with its gradient.

    Args:
        slot_hidden: [B, S, A*R, d]; weights: [B, A] fp32, of each thought of an anchor.
    """
    length = config.thought_length
    weights = weights.repeat_interleave(rationales, dim=1) / length
    return head.entropy_sum(
        slot_hidden[:, :length].transpose(1, 2).flatten(0, 2),
        weights[..., None].expand(-1, -1, length).flatten(),
        # The most likely thought (temperature 0) has a distribution behind it all the same.
        temperature=config.thought_temperature or 1.0,
        banned=banned_ids(config, slot_hidden.device),
    )


@dataclass
class Objective:
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


def add_up(
    config: QuietStarConfig, nll: Tensor, policy: Tensor | None, entropy: Tensor | None
) -> Objective:
    """The loss from its terms; ``policy`` and ``entropy`` are None where there is no such term."""
    language = nll if config.nll_weight == 1 else config.nll_weight * nll
    thinking = None
    if policy is not None and config.policy_weight:
        thinking = config.policy_weight * policy
    if entropy is not None:
        bonus = config.entropy_bonus * entropy
        thinking = -bonus if thinking is None else thinking - bonus
    loss = language if thinking is None else language + thinking
    return Objective(loss, language, thinking)

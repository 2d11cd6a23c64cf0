"""Which gain a thought is rewarded for, and what counts as an advantage.

Rewards, per thought and summed over the talk steps (all losses are cross entropies of the true token):

- ``mixture-gain``: base loss - loss of the mixed prediction. Zelikman et al. 2024 (arXiv 2403.09629).
- ``base-gain``: base loss - loss of the thought's own prediction, as if the mixing weight were 1. The
  mixture's reward is scaled by the mixing weight and vanishes with it; this one does not, so thoughts
  are told apart before the mixing head listens to any. It asks more of them, too: the NLL trains
  the mixture, and the thought's own prediction only through it.
- ``information-gain``: the same with the base loss of an exponential moving average of the model, that
  lags behind: Hatamizadeh et al. 2025 (RLP, arXiv 2510.01265, equations 3 to 5).
- ``probability-gain``: not a sum, but the probability of all these tokens under the mixed prediction
  less that under the base prediction. A sum of losses rewards being less wrong as much as being right;
  here only what makes the true text likely counts. Near to Yu et al. 2025 (RLPR, arXiv 2506.18254),
  who take the mean of the tokens' probabilities.

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
from quietstar.losses.language_model import LanguageModelLosses
from quietstar.thinking.decoder import ThoughtDecoder
from quietstar.thinking.text_batch import TextBatch

# Rewards that hardly differ are not blown up to advantages of 1.
STD_FLOOR = 1e-4


@dataclass
class ThoughtRewards:
    """What each thought earned.

    Attributes:
        reward: [B, A, R] fp32, over all talk steps, as ``config.reward`` says.
        advantage: [B, A, R] fp32, as ``config.advantage`` and ``clamp_advantage`` say.
    """

    reward: Tensor
    advantage: Tensor


@torch.no_grad()
def thought_rewards(
    td: ThoughtDecoder, batch: TextBatch, lm: LanguageModelLosses, slots: Tensor
) -> ThoughtRewards:
    """The reward of each thought, over all tokens that it is rewarded for.

    Args:
        slots: [B, S, M, d].
    """
    before, after = losses_per_talk_step(td, batch, lm, slots)
    if td.config.reward == "probability-gain":
        reward = (-after.sum(0)).exp() - (-before.sum(0)).exp()
    else:
        reward = (before - after).sum(0)
    reward = reward * batch.rewarded[..., None]
    return ThoughtRewards(reward, advantage_of(td.config, reward))


def losses_per_talk_step(
    td: ThoughtDecoder, batch: TextBatch, lm: LanguageModelLosses, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """What the true tokens cost without a thought [K, B, A, 1] and with each thought [K, B, A, R], fp32,
    as the reward compares them; 0 where there is no target.

    ``information-gain`` measures against the batch's ``baseline_losses``, the copy's; without them
    against the model's own base losses, which equal the copy's before the first step.
    """
    config, anchors, before, after = td.config, batch.anchors, lm.base_losses, lm.talk_losses
    assert anchors is not None
    if config.reward == "information-gain" and batch.baseline_losses is not None:
        before = batch.baseline_losses.to(before.dtype)
    k, last = after.shape[0], before.shape[1]
    steps = torch.arange(k, device=anchors.device)[:, None, None]
    before = pad(before, (0, 1)).expand(k, -1, -1).gather(2, (anchors[None] + steps).clamp(max=last))
    if config.reward in ("base-gain", "information-gain"):
        # The thought's own prediction, for one more vocabulary product.
        own = td.talk_hidden(slots, k).flatten(0, 2)
        after = td.output.cross_entropy(own, batch.talk_targets.flatten()).view_as(after)
    there = batch.has_target[..., None]
    return before[..., None] * there, after * there


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

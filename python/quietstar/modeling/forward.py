"""What one call of the model does: without thoughts, with them to predict, or with them to learn."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quietstar.losses.language_model import LanguageModelLosses, language_model_losses, text_losses
from quietstar.losses.policy import LossTerms, policy_loss, thought_entropy, total_loss
from quietstar.losses.rewards import ThoughtRewards, thought_rewards
from quietstar.modeling.output import QuietStarOutput
from quietstar.thinking.batch_share import ThoughtOver
from quietstar.thinking.decoder import ThoughtDecoder
from quietstar.thinking.rollout import Thoughts
from quietstar.thinking.slots import depth_of_end
from quietstar.thinking.text_batch import TextBatch


def training_forward(
    td: ThoughtDecoder, batch: TextBatch, thoughts: Thoughts | None = None
) -> QuietStarOutput:
    """Think, talk, learn: losses, rewards and the policy term of one batch with labels.

    Args:
        thoughts: of :func:`given_thoughts`; None: they are sampled.
    """
    # Without gradients to come the rollout may go on to the end, and serves as the packed pass.
    keep = None if torch.is_grad_enabled() else td.config.num_slots
    # Think.
    thoughts = thoughts or td.rollout(batch, keep)
    batch = batch.thinking_at(thoughts.anchors)
    text, slots = thoughts.hidden or td.packed(batch, thoughts)
    # Talk.
    lm = language_model_losses(td, batch, text, slots)
    # Learn.
    reward = thought_rewards(td, batch, lm, slots)
    policy = policy_loss(td, batch, slots, thoughts, reward)
    entropy = thought_entropy(td, batch, slots, thoughts)
    terms = total_loss(td.config, lm.nll, policy, entropy)
    return _training_output(batch, thoughts, lm, reward, policy, terms)


def thinking_forward(
    td: ThoughtDecoder, batch: TextBatch, thoughts: Thoughts | None = None
) -> QuietStarOutput:
    """Think, and stop before anything is differentiated: thoughts, and divisors of the batch's means."""
    thoughts = thoughts or td.rollout(batch)
    batch = batch.thinking_at(thoughts.anchors)
    divisors = {"targets": batch.target_divisors, "thoughts": batch.thought_divisor}
    return QuietStarOutput(thought_over=ThoughtOver(thoughts, divisors))


def _training_output(
    batch: TextBatch,
    thoughts: Thoughts,
    lm: LanguageModelLosses,
    reward: ThoughtRewards,
    policy: Tensor | None,
    terms: LossTerms,
) -> QuietStarOutput:
    return QuietStarOutput(
        loss=terms.loss,
        language_loss=terms.language_loss,
        thinking_loss=terms.thinking_loss,
        nll_loss=lm.nll.detach(),
        base_losses=lm.base_losses,
        base_loss=lm.base_loss,
        talk_losses=lm.talk_losses.transpose(2, 3),
        talk_loss=lm.talk_loss,
        reward=reward.reward.transpose(1, 2),
        advantage=reward.advantage.transpose(1, 2),
        policy_loss=None if policy is None else policy.detach(),
        mixing_weight=lm.mixing_weight.transpose(2, 3),
        anchors=batch.anchors,
        has_target=batch.has_target,
        rewarded=batch.rewarded,
        is_target=batch.is_target,
        thought_ids=_by_rationale(thoughts.ids, batch.rationales),
        thought_logprobs=_by_rationale(thoughts.logprobs, batch.rationales),
    )


def plain_forward(td: ThoughtDecoder, batch: TextBatch, logits_to_keep: int) -> QuietStarOutput:
    """The decoder without thoughts (``thought_kind="none"``): losses, or logits without labels."""
    text = td.text(batch)
    if batch.labels is None:
        return QuietStarOutput(logits=td.output.logits(text[:, -logits_to_keep:]))
    loss, losses = text_losses(td, batch, text)
    return QuietStarOutput(
        loss=loss,
        nll_loss=loss.detach(),
        base_losses=losses,
        base_loss=losses.sum() / batch.is_target.sum().clamp(min=1),
        is_target=batch.is_target,
    )


def prediction_forward(
    td: ThoughtDecoder, batch: TextBatch, thought_ids: Tensor | None, logits_to_keep: int
) -> QuietStarOutput:
    """Mixed logits after one thought per position: the slots end with the end token.

    Args:
        thought_ids: as the model's forward takes them; None: thoughts are sampled.
    """
    rows, length = batch.input_ids.shape
    slots = depth_of_end(td.config)
    if batch.anchors is None:
        kept = logits_to_keep or length
        anchors = torch.arange(length - kept, length, device=batch.input_ids.device)
        batch = replace(batch, anchors=anchors.expand(rows, -1))
    if thought_ids is None:
        thoughts = td.rollout(batch, slots)
    else:
        if thought_ids.dim() == 4 and thought_ids.shape[1] != 1:
            raise ValueError(
                f"thought_ids has {thought_ids.shape[1]} rationales; expected 1 without labels"
            )
        batch, thoughts = given_thoughts(td, batch, thought_ids)
    text, slot_hidden = thoughts.hidden or td.packed(batch, thoughts, slots)
    mixed, weight = td.mix(batch, text, slot_hidden, steps=1)
    return QuietStarOutput(
        logits=td.output.logits(mixed[0]),
        mixing_weight=weight[:, :, None].detach(),
        anchors=batch.anchors,
        thought_ids=_by_rationale(thoughts.ids, 1),
        thought_logprobs=_by_rationale(thoughts.logprobs, 1),
    )


def given_thoughts(
    td: ThoughtDecoder, batch: TextBatch, thought_ids: Tensor
) -> tuple[TextBatch, Thoughts]:
    """The batch with its anchors and rationales, and the given thoughts at them.

    Args:
        thought_ids: [B, R, N, T] or [B, R, A, T].

    Raises:
        ValueError: for thoughts of another shape.
    """
    batch = td.choose_anchors(batch)
    anchors, (rows, length) = batch.anchors, batch.input_ids.shape
    assert anchors is not None
    count, size = anchors.shape[1], td.config.thought_length
    given = tuple(thought_ids.shape)
    fits = len(given) == 4 and given[0] == rows and given[2] in (length, count)
    if not fits or given[1] < 1 or given[3] != size:
        raise ValueError(
            f"thought_ids has shape {list(given)}; expected [{rows}, rationales, {length},"
            f" {size}] (rows, rationales, positions, thought_length)"
        )
    if given[2] != count:
        index = anchors[:, None, :, None].expand(-1, given[1], -1, given[3])
        thought_ids = thought_ids.gather(2, index)
    ids = thought_ids.transpose(1, 2).flatten(1, 2)
    return replace(batch, rationales=given[1]), Thoughts(anchors, ids)


def _by_rationale(columns: Tensor | None, rationales: int) -> Tensor | None:
    """[B, A*R, T] -> [B, R, A, T]."""
    if columns is None:
        return None
    return columns.unflatten(1, (-1, rationales)).transpose(1, 2)

"""One batch of text, and what follows from it: its targets, whose thoughts count, every divisor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from quietstar.config import QuietStarConfig
from quietstar.thinking.batch_share import WHOLE_BATCH, BatchShard
from quietstar.thinking.layout import TextRanges
from quietstar.thinking.output_layer import IGNORE


def target_labels(labels: Tensor, ranges: TextRanges) -> Tensor:
    """Labels [B, N] without those of which nothing can be predicted: padding, and every document's
    first token, which has no context."""
    return labels.masked_fill(ranges.stop - ranges.start <= 1, IGNORE)


def check_labels(labels: Tensor, ranges: TextRanges) -> Tensor:
    """:func:`target_labels`, of which there has to be one.

    Raises:
        ValueError: if nothing is left.
    """
    labels = target_labels(labels, ranges)
    if not bool((labels[:, 1:] != IGNORE).any()):
        raise ValueError("labels are all ignored (-100 or padding); expected at least one target")
    return labels


def talk_targets(labels: Tensor, anchors: Tensor, talk_length: int, ranges: TextRanges) -> Tensor:
    """The true token that talk step k of an anchor predicts: labels[anchor + 1 + k], [K, B, A].

    A thought that hangs from padding has nothing to say, and none speaks of the next document.
    """
    length = labels.shape[1]
    ahead = anchors[None] + 1 + torch.arange(talk_length, device=labels.device)[:, None, None]
    picked = labels.expand(talk_length, -1, -1).gather(2, ahead.clamp(max=length - 1))
    is_text = (ranges.start < ranges.stop).gather(1, anchors)
    return torch.where((ahead < length) & is_text & ~ranges.crosses(anchors, ahead), picked, IGNORE)


def count_targets(labels: Tensor, targets: Tensor) -> Tensor:
    """How many tokens each mean of the NLL is over, [1 + K]: the base prediction's, each talk step's.

    Args:
        labels: [B, N]; targets: [K, B, M] of :func:`talk_targets`.
    """
    return torch.cat([(labels[:, 1:] != IGNORE).sum()[None], (targets != IGNORE).sum((1, 2))])


def which_count(
    config: QuietStarConfig, anchors: Tensor, has_target: Tensor, ranges: TextRanges
) -> tuple[Tensor, Tensor]:
    """The anchors whose thoughts are rewarded, and those that the policy term's mean is over.

    A thought counts if its anchor is text and at least one of the tokens that it is rewarded for is a
    target in its own document. With ``policy_mean: paper`` it counts if the row goes on for all of its
    talk steps, and the mean is over every such position of a row, padding included.

    Args:
        anchors: [B, A]; has_target: [K, B, A] bool of :class:`TextBatch`.

    Returns:
        rewarded and averaged, [B, A] bool.
    """
    rewarded = has_target.any(0)
    if config.policy_mean == "rewarded":
        return rewarded, rewarded
    ahead = anchors + 1 + has_target.shape[0]
    complete = ahead < ranges.stop.shape[1]
    return rewarded & complete & ~ranges.crosses(anchors, ahead), complete


@dataclass(frozen=True, eq=False)
class TextBatch:
    """One batch of text and how it is thought about. What follows from it is computed once.

    Sizes: B rows, N tokens, A anchors per row, R rationales, M = A*R columns, K talk steps.

    Attributes:
        config: of the model.
        input_ids: [B, N] int64.
        ranges: what each token sees, and where its document ends
            (:func:`quietstar.thinking.documents.batch_ranges`).
        attention_mask: [B, N], as it was given; a decoder without thoughts gets it.
        labels: [B, N] int64 of :func:`target_labels`, or None where nothing is learnt.
        baseline_losses: [B, N-1] fp32, what the reward ``information-gain`` measures against.
        anchors: [B, A] int64, the positions that think; None: what ``config.think_at`` says.
        rationales: R, thoughts per anchor; they share the text's keys.
        temperature: of the thoughts' tokens; 0 takes the most likely.
        shard: its share of a larger batch; divisors and random numbers are the larger one's.
        every_position: promise (unchecked) that the anchors are all positions in order.
    """

    config: QuietStarConfig
    input_ids: Tensor
    ranges: TextRanges
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    baseline_losses: Tensor | None = None
    anchors: Tensor | None = None
    rationales: int = 1
    temperature: float = 1.0
    shard: BatchShard = WHOLE_BATCH
    every_position: bool = False

    def thinking_at(self, anchors: Tensor) -> TextBatch:
        """The batch with the anchors [B, A] that ``config.think_at`` chose for it; as it is where it
        has anchors of its own."""
        if self.anchors is not None:
            return self
        return replace(self, anchors=anchors, every_position=self.config.parse_think_at()[0] == "all")

    @cached_property
    def columns(self) -> Tensor:
        """[B, M], every column's anchor; rationales of a position are neighbours."""
        assert self.anchors is not None
        return self.anchors.repeat_interleave(self.rationales, dim=1)

    @cached_property
    def targets(self) -> Tensor:
        """[B, N-1], the token that each position predicts, -100 where none counts."""
        assert self.labels is not None
        return self.labels[:, 1:]

    @cached_property
    def is_target(self) -> Tensor:
        """[B, N-1] bool."""
        return self.targets != IGNORE

    @cached_property
    def talk_targets(self) -> Tensor:
        """[K, B, M], the true tokens of the talk steps (:func:`talk_targets`)."""
        assert self.labels is not None
        return talk_targets(self.labels, self.columns, self.config.talk_length, self.ranges)

    @cached_property
    def has_target(self) -> Tensor:
        """[K, B, A] bool: whether a talk step of an anchor has a target."""
        return (self.talk_targets != IGNORE)[..., :: self.rationales]

    @cached_property
    def counts(self) -> Tensor:
        """How many tokens each mean of the NLL is over, [1 + K], or [1] without thoughts."""
        if not self.config.thinks:
            return self.is_target.sum()[None]
        assert self.labels is not None
        return count_targets(self.labels, self.talk_targets)

    @cached_property
    def _which_count(self) -> tuple[Tensor, Tensor]:
        assert self.anchors is not None
        return which_count(self.config, self.anchors, self.has_target, self.ranges)

    @property
    def rewarded(self) -> Tensor:
        """[B, A] bool: whose thoughts are rewarded (:func:`which_count`)."""
        return self._which_count[0]

    @property
    def thought_count(self) -> Tensor:
        """How many thoughts the policy term's mean is over, a scalar."""
        return self._which_count[1].sum() * self.rationales

    @cached_property
    def target_divisors(self) -> Tensor:
        """What the sums of the NLL are divided by, fp32 in the shape of ``counts``."""
        return self.shard.mean_count("targets", self.counts)

    @cached_property
    def thought_divisor(self) -> Tensor:
        """What sums over thoughts are divided by, an fp32 scalar."""
        return self.shard.mean_count("thoughts", self.thought_count)

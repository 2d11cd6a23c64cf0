"""One batch of text, and what follows from it: its targets, whose thoughts count, every divisor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

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


def num_rationales(config: QuietStarConfig, learns: bool) -> int:
    """R: more than one thought per position only where they are sampled and compared."""
    return config.num_rationales if learns and config.thought_kind != "pause" else 1


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
        anchors: [B, A] int64, the positions that think, ascending; None: what ``config.think_at`` says.
            One that repeats the one before only fills up the shape and counts nowhere.
        rationales: R, thoughts per anchor; they share the text's keys.
        temperature: of the thoughts' tokens; 0 takes the most likely.
        shard: its share of a larger batch; divisors and random numbers are the larger one's.
        completion_anchors: [B, C] int64, the positions before completions, for the rule ``completion``.
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
    completion_anchors: Tensor | None = None
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
    def repeats(self) -> Tensor:
        """[B, A] bool: anchors that repeat the one before, in rows that have fewer than others."""
        assert self.anchors is not None
        return pad(self.anchors[:, 1:] == self.anchors[:, :-1], (1, 0))

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
        """[K, B, M], the true token that talk step k of a column predicts: labels[anchor + 1 + k].

        A thought that hangs from padding has nothing to say, and none speaks of the next document.
        """
        assert self.labels is not None
        columns, length, steps = self.columns, self.labels.shape[1], self.config.talk_length
        ahead = columns[None] + 1 + torch.arange(steps, device=columns.device)[:, None, None]
        picked = self.labels.expand(steps, -1, -1).gather(2, ahead.clamp(max=length - 1))
        is_text = (self.ranges.start < self.ranges.stop).gather(1, columns)
        is_text &= ~self.repeats.repeat_interleave(self.rationales, dim=1)
        counts = (ahead < length) & is_text & ~self.ranges.crosses(columns, ahead)
        return torch.where(counts, picked, IGNORE)

    @cached_property
    def has_target(self) -> Tensor:
        """[K, B, A] bool: whether a talk step of an anchor has a target."""
        return (self.talk_targets != IGNORE)[..., :: self.rationales]

    @cached_property
    def counts(self) -> Tensor:
        """How many tokens each mean of the NLL is over, [1 + K]: the base prediction's, each talk
        step's; [1] without thoughts."""
        base = self.is_target.sum()[None]
        if not self.config.thinks:
            return base
        return torch.cat([base, (self.talk_targets != IGNORE).sum((1, 2))])

    @cached_property
    def rewarded(self) -> Tensor:
        """[B, A] bool: whose thoughts are rewarded.

        A thought counts if its anchor is text and at least one of the tokens that it is rewarded for is
        a target in its own document; with ``policy_mean: paper`` if its document goes on for all of its
        talk steps, too.
        """
        assert self.anchors is not None
        rewarded = self.has_target.any(0)
        if self.config.policy_mean == "rewarded":
            return rewarded
        ahead = self.anchors + 1 + self.config.talk_length
        return rewarded & self.averaged & ~self.ranges.crosses(self.anchors, ahead)

    @property
    def averaged(self) -> Tensor:
        """[B, A] bool: the anchors that the policy term's mean is over: the rewarded ones, or with
        ``policy_mean: paper`` all whose row goes on for all talk steps, padding included."""
        assert self.anchors is not None
        if self.config.policy_mean == "rewarded":
            return self.rewarded
        return (self.anchors + 1 + self.config.talk_length < self.input_ids.shape[1]) & ~self.repeats

    @property
    def thought_count(self) -> Tensor:
        """How many thoughts the policy term's mean is over, a scalar."""
        return self.averaged.sum() * self.rationales

    @cached_property
    def target_divisors(self) -> Tensor:
        """What the sums of the NLL are divided by, fp32 in the shape of ``counts``."""
        return self.shard.mean_count("targets", self.counts)

    @cached_property
    def thought_divisor(self) -> Tensor:
        """What sums over thoughts are divided by, an fp32 scalar."""
        return self.shard.mean_count("thoughts", self.thought_count)

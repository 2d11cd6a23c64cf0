"""The batch of an optimiser step as one: over processes and over accumulated micro-batches.

A step's loss is a sum of means over what counts in the *global* batch of the step, and its random
numbers are those of the global batch. :class:`GlobalBatch` finds out what the model has to be told for
that, see :class:`~quietstar.thinking.batch_share.BatchShard`. Where the thinking positions are known
before the pass (``think_at`` all, stride, random and completion) the counts of all micro-batches are
known before the first; where they follow from it (entropy and loss) each micro-batch's means are its
own, over all processes, and weigh as its targets do.

Rows, micro-batches and processes without a single target contribute nothing. A whole step without one
is left out: no pass is made and nothing moves, on no process. :class:`MissingTargets` counts both.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from quietstar.checkpoints.save import saved_count
from quietstar.config import QuietStarConfig
from quietstar.modeling.input_checks import check_text
from quietstar.think_rules import follows_from_the_pass
from quietstar.thinking.anchors import choose_anchors
from quietstar.thinking.batch_share import WHOLE_BATCH, BatchShard, MeanCount
from quietstar.thinking.documents import batch_ranges
from quietstar.thinking.text_batch import TextBatch, num_rationales, target_labels
from quietstar.training.options import check_batch

logger = logging.getLogger("quietstar")


def text_batch(
    config: QuietStarConfig, batch: dict[str, Any], shard: BatchShard = WHOLE_BATCH
) -> TextBatch:
    """A batch as the model will see it while it learns.

    Args:
        batch: arguments of the model, with ``input_ids`` and ``labels`` [B, N].
    """
    check_batch(batch)
    ids, thoughts = batch["input_ids"], batch.get("thought_ids")
    check_text(config, ids, batch["labels"], False)
    ranges = batch_ranges(batch)
    return TextBatch(
        config,
        ids,
        ranges,
        labels=target_labels(batch["labels"], ranges),
        anchors=batch.get("anchors"),
        rationales=num_rationales(config, True) if thoughts is None else thoughts.shape[1],
        shard=shard,
        completion_anchors=batch.get("completion_anchors"),
    )


def loss_divisors(
    config: QuietStarConfig, batch: dict[str, Any], shard: BatchShard
) -> dict[str, Tensor] | None:
    """The counts of one batch that the model will divide by, by name; None if they depend on the pass.

    Args:
        batch: arguments of the model.
        shard: which share of the global batch it is; positions that are drawn are drawn with it.
    """
    text = text_batch(config, batch, shard)
    if not config.thinks:
        return {"targets": text.counts}
    if text.anchors is None and follows_from_the_pass(config.parse_think_at()[0]):
        return None
    text = choose_anchors(text)
    return {"targets": text.counts, "thoughts": text.thought_count}


class GlobalBatch:
    """The micro-batches of a step on all processes, each of which holds its own share of them.

    Args:
        args: of the training; what is drawn follows from their seed, the step and the micro-batch.

    Attributes:
        targets: of each micro-batch of the step, over all processes.
        fraction: of a micro-batch's rows that the model sees now.
    """

    def __init__(self, accelerator: Accelerator, args: TrainingArguments):
        self._accelerator = accelerator
        self._args = args
        self._mean_counts: dict[str, Tensor] | None = None
        self.targets: list[int] = []
        self._part: BatchShard | None = None
        self.fraction = 1.0
        self.start([], 0)

    @contextmanager
    def part(self, share: BatchShard, fraction: float) -> Iterator[None]:
        """In the block the model sees this share, of some rows of the micro-batch that was taken last.

        Args:
            fraction: of the micro-batch's rows.
        """
        self._part, self.fraction = share, fraction
        try:
            yield
        finally:
            self._part, self.fraction = None, 1.0

    def start(self, micro_batches: Sequence[dict[str, Any]], step: int) -> None:
        """Begin a step with this process's micro-batches; ``step`` of them have been taken."""
        self._micro_batches, self._step, self._next = micro_batches, step, 0

    @property
    def at_its_start(self) -> bool:
        """Whether no micro-batch has been trained on."""
        return self._next == 0

    @property
    def has_target(self) -> bool:
        """Whether there is anything to learn from; True as long as nothing was counted."""
        return any(self.targets) or not self.targets

    def skip(self) -> None:
        """Leave out a micro-batch."""
        self._next += 1

    def count_targets(self, config: QuietStarConfig) -> tuple[int, int]:
        """Count :attr:`targets`; returns how many rows have none, and how many there are."""
        self.targets = []
        per_row = [text_batch(config, batch).is_target.sum(1) for batch in self._micro_batches]
        if not per_row:
            return 0, 0
        without = torch.stack([(count == 0).sum() for count in per_row]).sum()
        found = torch.stack([without, *(count.sum() for count in per_row)]).to(self._accelerator.device)
        if self._accelerator.num_processes > 1:
            found = self._accelerator.reduce(found, reduction="sum")
        rows_without, *self.targets = found.tolist()
        return rows_without, sum(map(len, per_row)) * self._accelerator.num_processes

    def next_share(self, config: QuietStarConfig) -> BatchShard:
        """What the model is told about the next micro-batch, or in :meth:`part` about that part."""
        if self._part is not None:
            return self._part
        number = self._next
        self._next += 1
        share = self._share(number)
        if share.count == 1 and len(self._micro_batches) <= 1:
            return share
        if number == 0:
            # Not before now: a callback may have changed the lengths at the beginning of the step.
            self._mean_counts = self._count(config)
        known = self._mean_counts
        targets = self.targets[number] if number < len(self.targets) else 0
        weight = len(self.targets) * targets / sum(self.targets) if targets else 1.0

        def mean_count(name: str, own: Tensor) -> Tensor:
            if known is not None:
                return known[name].to(own.device)
            # A mean of this micro-batch alone, which weighs as much as it has targets.
            return self._accelerator.reduce(own.float(), reduction="mean") / weight

        return self._share(number, mean_count)

    def _share(self, number: int, mean_count: MeanCount | None = None) -> BatchShard:
        """This process's share of a micro-batch, with the seed of what is drawn in it."""
        text = f"{self._args.seed}/{self._step}/{number}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 2
        processes, index = self._accelerator.num_processes, self._accelerator.process_index
        return BatchShard(index, processes, mean_count, seed)

    def _count(self, config: QuietStarConfig) -> dict[str, Tensor] | None:
        """Mean counts over all processes' micro-batches of this step; None if they cannot be known."""
        found = [
            loss_divisors(config, batch, self._share(number))
            for number, batch in enumerate(self._micro_batches)
        ]
        known = [counts for counts in found if counts is not None]
        if not known or len(known) < len(found):
            return None
        device = self._accelerator.device
        return {
            name: self._accelerator.reduce(
                torch.stack([counts[name].to(device) for counts in known]).double().mean(0).float(),
                reduction="mean",
            )
            for name in known[0]
        }


class MissingTargets:
    """Counts the steps and rows without a target, and keeps them out of the mean losses.

    Args:
        speaks: whether this process says in the log what it has counted.

    Attributes:
        counts: of the training so far, over all processes, as the log has them.
    """

    def __init__(self, speaks: bool):
        self._speaks = speaks
        self.counts = {"steps_without_targets": 0, "rows_without_targets": 0}
        # Of this call of train, and since the last log entry: steps, and those without a target.
        self._in_training, self._since_log = [0, 0], [0, 0]
        self._last_loss: float | None = None

    def begin(self, state: TrainerState) -> None:
        """Begin a training, or go on with one."""
        for name in self.counts:
            self.counts[name] = saved_count(state, name)
        self._in_training, self._since_log = [0, 0], [0, 0]
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self._last_loss = logged[-1] if logged else None

    def add_step(self, number: int, batch: GlobalBatch, config: QuietStarConfig) -> None:
        """Count a step (from 1), at its start."""
        without, rows = batch.count_targets(config)
        if not rows:
            return
        if without and not self.counts["rows_without_targets"] and self._speaks:
            logger.warning(
                "%d of the %d rows of step %d have no target (labels are all -100 or padding); such rows"
                " teach nothing, and a step of nothing else is skipped: rows_without_targets and"
                " steps_without_targets in the log count them",
                without,
                rows,
                number,
            )
        for counted in (self._in_training, self._since_log):
            counted[0] += 1
            counted[1] += not batch.has_target
        self.counts["rows_without_targets"] += without
        self.counts["steps_without_targets"] += not batch.has_target

    def correct_losses(self, logs: dict[str, float]) -> None:
        """Correct transformers' mean losses, which count a step without a target as one with the loss 0.

        An entry on such steps alone repeats the loss of the one before; if there is none, it has none.
        """
        if "loss" in logs:
            steps, empty = self._since_log
            self._since_log = [0, 0]
            if steps > empty:
                logs["loss"] *= steps / (steps - empty)
                self._last_loss = logs["loss"]
            elif steps and self._last_loss is not None:
                logs["loss"] = self._last_loss
            elif steps:
                del logs["loss"]
        if "train_loss" in logs:
            steps, empty = self._in_training
            if steps > empty:
                logs["train_loss"] *= steps / (steps - empty)
            elif steps and self._last_loss is not None:
                logs["train_loss"] = self._last_loss

    def check_some(self, steps: int) -> None:
        """Raise ``ValueError`` if none of so many steps of the whole training had a target."""
        if steps and steps == self.counts["steps_without_targets"]:
            raise ValueError(
                f"none of the rows of {steps} steps has a target (labels are all -100 or padding);"
                " expected training data with tokens to predict"
            )

    def end(self, steps: int) -> None:
        """Say at the end of a training what was missing."""
        self.check_some(steps)
        if self.counts["rows_without_targets"] and self._speaks:
            logger.warning(
                "%d rows of the training had no target, and %d of %d steps were skipped for having none",
                self.counts["rows_without_targets"],
                self.counts["steps_without_targets"],
                steps,
            )

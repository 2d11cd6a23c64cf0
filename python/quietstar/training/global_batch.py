"""The Trainer's batches as one: over processes and over accumulated micro-batches.

A step's loss is a sum of means over what counts in the *whole* batch of the step, and its random numbers
are those of the whole batch. This mixin finds out what the model has to be told for that, see
:class:`~quietstar.thinking.batch_share.BatchShard`. Where the thinking positions are known before the
pass (``think_at`` all, stride and random) the counts of all micro-batches are known before the first;
where they follow from it (entropy) each micro-batch's means are its own, over all processes, and weigh
as its targets do.

Rows, micro-batches and processes without a single target contribute nothing. A whole step without one is
left out: no pass is made and nothing moves, on no process; it is counted, and so are the rows.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from quietstar.checkpoints.save import saved_count
from quietstar.config import QuietStarConfig
from quietstar.modeling.input_checks import check_text
from quietstar.thinking.anchors import choose_anchors
from quietstar.thinking.batch_share import BatchShard, MeanCount
from quietstar.thinking.documents import DESCRIPTIONS, batch_ranges
from quietstar.thinking.layout import TextRanges
from quietstar.thinking.output_layer import IGNORE
from quietstar.thinking.text_batch import (
    count_targets,
    talk_targets,
    target_labels,
    which_count,
)
from quietstar.training.options import check_batch

logger = logging.getLogger("quietstar")


def ranges_and_labels(config: QuietStarConfig, batch: dict[str, Any]) -> tuple[TextRanges, Tensor]:
    """What each token of a batch sees, and the labels of those that the model learns to predict.

    Args:
        batch: arguments of the model, with ``input_ids`` and ``labels`` [B, N].
    """
    check_batch(batch)
    check_text(config, batch["input_ids"], batch["labels"], False)
    ranges = batch_ranges(batch)
    return ranges, target_labels(batch["labels"], ranges)


def count_what_counts(
    config: QuietStarConfig, batch: dict[str, Any], part: BatchShard
) -> dict[str, Tensor] | None:
    """The counts of one batch that the model will divide by, by name; None if they depend on the pass.

    Args:
        batch: arguments of the model.
        part: which part of the larger batch it is; positions that are drawn are drawn with it.
    """
    ranges, labels = ranges_and_labels(config, batch)
    if not config.thinks:
        return {"targets": (labels[:, 1:] != IGNORE).sum()[None]}
    anchors = batch.get("anchors")
    if anchors is None:
        if config.parse_think_at()[0] == "entropy":
            return None
        anchors = choose_anchors(config, ranges, None, None, part)
    rationales = 1 if config.thought_kind == "pause" else config.num_rationales
    if batch.get("thought_ids") is not None:
        rationales = batch["thought_ids"].shape[1]
    targets = talk_targets(labels, anchors, config.talk_length, ranges)
    counts = count_targets(labels, targets)
    counts[1:] *= rationales
    _, averaged = which_count(config, anchors, targets != IGNORE, ranges)
    return {"targets": counts, "thoughts": averaged.sum() * rationales}


class WholeBatches(Trainer):
    """A Trainer that tells the model which part of the step's batch it sees."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._micro_batches: list[dict[str, Any]] = []
        self._next_micro_batch = 0
        self._counts: dict[str, Tensor] | None = None
        self._has_target = True
        # Of each micro-batch of the step, over all processes.
        self._targets: list[int] = []
        # Of the training so far, over all processes, as the log has them.
        self.without_targets = {"steps_without_targets": 0, "rows_without_targets": 0}
        # Of this call of train, and since the last log entry: steps, and those without a target.
        self._in_training, self._since_log = [0, 0], [0, 0]
        self._last_loss: float | None = None
        self._check_parallelism()
        self.add_callback(_CountsTargets(self))

    def _check_parallelism(self) -> None:
        """Refuse what would run without thoughts' means, or not at all, before training."""
        state: Any = self.accelerator.state
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp is {self.args.fsdp!r} on {self.args.device.type}, where accelerate would run DDP"
                " instead; expected an accelerator, or fsdp left out"
            )
        if self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(
                f"fsdp_config version is {state.fsdp_plugin.fsdp_version}; expected 2 (a rollout needs"
                " the output layer's own weight, which FSDP1 flattens)"
            )
        if self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed zero_stage is 3; expected 0 to 2, or FSDP2, which shards the same (a rollout"
                " would gather every layer at every slot)"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process would run {self.args.n_gpu} GPUs (torch's DataParallel), which thoughts do"
                " not support; expected a process for each (torchrun, accelerate launch), or one GPU"
            )
        if self.accelerator.num_processes > 1:
            self._check_several_processes()
        sizes = {
            "tensor": self.get_tp_size(),
            "context": self.get_cp_size(),
            "sequence": self.get_sp_size(),
        }
        for kind, size in sizes.items():
            if size > 1:
                raise ValueError(
                    f"{kind} parallelism over {size} processes is not supported with thoughts; expected"
                    " data parallelism (DDP, FSDP2)"
                )

    def _check_several_processes(self) -> None:
        if not self.args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices is False; expected True, every mean is over the whole"
                " batch"
            )
        if getattr(self.args, "train_sampling_strategy", None) == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy is 'batch_rebalance', which gives processes different numbers"
                " of rows; expected another"
            )

    def _set_signature_columns_if_needed(self) -> None:
        """Rows may have what describes their documents, which forward takes without naming it."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [n for n in DESCRIPTIONS if n not in self._signature_columns]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; the mean loss is over the steps that have a target."""
        result = super().train(*args, **kwargs)
        if isinstance(result, TrainOutput):
            return result._replace(training_loss=result.metrics["train_loss"])
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', whose mean losses count a step without a target as one with the loss 0.

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
        super().log(logs, start_time)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one step."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches, self._next_micro_batch = batches, 0
        return batches, count

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, unless the whole step has no target."""
        if self._next_micro_batch == 0:
            self._look_for_targets(self.accelerator.unwrap_model(model).config)
        # A gradient scaler has to see gradients; they are zero, and dropped before the step.
        if self._has_target or getattr(self.accelerator, "scaler", None) is not None:
            return super().training_step(model, *args, **kwargs)
        self._next_micro_batch += 1
        return torch.zeros((), device=self.args.device)

    def _look_for_targets(self, config: QuietStarConfig) -> None:
        """Whether any process has a target in this step; counts rows and steps that have none."""
        self._has_target, self._targets = True, []
        looked = [ranges_and_labels(config, batch) for batch in self._micro_batches]
        rows = [(labels[:, 1:] != IGNORE).sum(1) for _, labels in looked]
        if not rows:
            return
        without_any = torch.stack([(count == 0).sum() for count in rows]).sum()
        found = torch.stack([without_any, *(count.sum() for count in rows)]).to(self.args.device)
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, reduction="sum")
        without, *self._targets = found.tolist()
        if without and not self.without_targets["rows_without_targets"] and self.is_world_process_zero():
            logger.warning(
                "%d of the %d rows of step %d have no target (labels are all -100 or padding); such rows"
                " teach nothing, and a step of nothing else is skipped: rows_without_targets and"
                " steps_without_targets in the log count them",
                without,
                sum(map(len, rows)) * self.accelerator.num_processes,
                self.state.global_step + 1,
            )
        self._has_target = any(self._targets)
        for counted in (self._in_training, self._since_log):
            counted[0] += 1
            counted[1] += not self._has_target
        self.without_targets["rows_without_targets"] += without
        self.without_targets["steps_without_targets"] += not self._has_target

    def next_batch_part(self, config: QuietStarConfig) -> BatchShard:
        """What the model is told about the next micro-batch of a training step."""
        number = self._next_micro_batch
        self._next_micro_batch += 1
        part = self._part(number)
        if part.count == 1 and len(self._micro_batches) <= 1:
            return part
        if number == 0:
            # Not before now: a callback may have changed the lengths at the beginning of the step.
            self._counts = self._mean_counts(config)
        known = self._counts
        targets = self._targets[number] if number < len(self._targets) else 0
        share = len(self._targets) * targets / sum(self._targets) if targets else 1.0

        def mean_count(name: str, own: Tensor) -> Tensor:
            if known is not None:
                return known[name].to(own.device)
            # A mean of this micro-batch alone, which weighs as much as it has targets.
            return self.accelerator.reduce(own.float(), reduction="mean") / share

        return self._part(number, mean_count)

    def _part(self, number: int, mean_count: MeanCount | None = None) -> BatchShard:
        """This process's part of a micro-batch, with the seed of what is drawn in it."""
        text = f"{self.args.seed}/{self.state.global_step}/{number}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 2
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        return BatchShard(index, processes, mean_count, seed)

    def _mean_counts(self, config: QuietStarConfig) -> dict[str, Tensor] | None:
        """Mean counts over all processes' micro-batches of this step; None if they cannot be known."""
        found = [
            count_what_counts(config, batch, self._part(number))
            for number, batch in enumerate(self._micro_batches)
        ]
        known = [counts for counts in found if counts is not None]
        if not known or len(known) < len(found):
            return None
        device = self.accelerator.device
        return {
            name: self.accelerator.reduce(
                torch.stack([counts[name].to(device) for counts in known]).double().mean(0).float(),
                reduction="mean",
            )
            for name in known[0]
        }


class _CountsTargets(TrainerCallback):
    """Begins the counts, and ends a run that has nothing to learn from."""

    def __init__(self, trainer: WholeBatches):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        for name in trainer.without_targets:
            trainer.without_targets[name] = saved_count(state, name)
        trainer._in_training, trainer._since_log = [0, 0], [0, 0]
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        trainer._last_loss = logged[-1] if logged else None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Of the whole training: a resumed run has perhaps learnt before.
        steps = state.global_step
        if steps and steps == self._trainer.without_targets["steps_without_targets"]:
            raise ValueError(
                f"none of the rows of {steps} steps has a target (labels are all -100 or padding);"
                " expected training data with tokens to predict"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_epoch_end(args, state, control, **kwargs)
        counts = self._trainer.without_targets
        if counts["rows_without_targets"] and state.is_world_process_zero:
            logger.warning(
                "%d rows of the training had no target, and %d of %d steps were skipped for having none",
                counts["rows_without_targets"],
                counts["steps_without_targets"],
                state.global_step,
            )

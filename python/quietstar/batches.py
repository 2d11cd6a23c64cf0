"""The Trainer's batches as one: over processes and over accumulated micro-batches.

A step's loss is a sum of means over what counts in the *whole* batch of the step, and its random numbers
are those of the whole batch. This mixin finds out what the model has to be told for that, see
:class:`~quietstar.parts.BatchPart`. Where the thinking positions follow from the text (``think_at`` all
or stride) the counts of all micro-batches are known before the first; where they are drawn (random,
entropy) each micro-batch's means are its own, over all processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .config import QuietStarConfig
from .documents import DESCRIPTIONS, batch_ranges
from .learn import can_be_rewarded
from .parts import BatchPart
from .talk import check_labels, count_targets, talk_targets
from .think import choose_anchors
from .trainer_options import check_batch


def count_what_counts(config: QuietStarConfig, batch: dict[str, Any]) -> dict[str, Tensor] | None:
    """The counts of one batch that the model will divide by, by name; None if they depend on the pass.

    Args:
        batch: arguments of the model, with ``input_ids`` and ``labels`` [B, N].
    """
    check_batch(batch)
    ids = batch["input_ids"]
    ranges = batch_ranges(batch)
    labels = check_labels(batch["labels"], ranges)
    if not config.thinks:
        return {"targets": (labels[:, 1:] != -100).sum()[None]}
    anchors = batch.get("anchors")
    if anchors is None:
        if config.parse_think_at()[0] not in ("all", "stride"):
            return None
        anchors = choose_anchors(config, ids, ranges.start < ranges.stop, None, None)
    rationales = 1 if config.thought_kind == "pause" else config.num_rationales
    if batch.get("thought_ids") is not None:
        rationales = batch["thought_ids"].shape[1]
    targets = talk_targets(labels, anchors, config.talk_length, ranges)
    counts = count_targets(labels, targets)
    counts[1:] *= rationales
    rewarded = can_be_rewarded(anchors, config.talk_length, ranges)
    is_text = (ranges.start < ranges.stop).gather(1, anchors)
    return {
        "targets": counts,
        "thoughts": rewarded.sum() * rationales,
        "entropy": (rewarded & is_text).sum() * rationales,
    }


class WholeBatches(Trainer):
    """A Trainer that tells the model which part of the step's batch it sees."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._micro_batches: list[dict[str, Any]] = []
        self._next_micro_batch = 0
        self._counts: dict[str, Tensor] | None = None
        self._check_parallelism()

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

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one step."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches, self._next_micro_batch = batches, 0
        return batches, count

    def next_batch_part(self, config: QuietStarConfig) -> BatchPart:
        """What the model is told about the next micro-batch of a training step."""
        number = self._next_micro_batch
        self._next_micro_batch += 1
        text = f"{self.args.seed}/{self.state.global_step}/{number}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 2
        processes = self.accelerator.num_processes
        index = self.accelerator.process_index
        if processes == 1 and len(self._micro_batches) <= 1:
            return BatchPart(seed=seed)
        if number == 0:
            # Not before now: a callback may have changed the lengths at the beginning of the step.
            self._counts = self._mean_counts(config)
        known = self._counts

        def mean_count(name: str, own: Tensor) -> Tensor:
            if known is not None:
                return known[name].to(own.device)
            return self.accelerator.reduce(own.float(), reduction="mean")

        return BatchPart(index, processes, mean_count, seed)

    def _mean_counts(self, config: QuietStarConfig) -> dict[str, Tensor] | None:
        """Mean counts over all processes' micro-batches of this step; None if they cannot be known."""
        found = [count_what_counts(config, batch) for batch in self._micro_batches]
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

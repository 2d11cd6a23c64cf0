"""A micro-batch whose rows are learnt from a few at a time, with thoughts that were sampled for all.

The rollout keeps nothing for a backward pass, so memory allows it many rows; the packed pass keeps
every activation. With ``rows_per_backward`` the rollout takes the whole micro-batch, whose slots fill
the device, and packed and backward passes take so many rows at a time, so that they need no gradient
checkpointing. Thoughts, losses and gradients are those of the whole micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quietstar.thinking.batch_share import ThoughtOver
from quietstar.training.global_batch import text_batch
from quietstar.training.options import check_batch

if TYPE_CHECKING:
    from quietstar.training.trainer import QuietStarTrainer


def in_parts(
    trainer: QuietStarTrainer, model: nn.Module, inputs: dict[str, Any], rows: int | None
) -> Iterator[dict[str, Any]]:
    """The parts of a micro-batch to be trained on one after the other; the whole one if it has no more
    than ``rows``.

    Around all but the last gradients stay in their process; those of FSDP2 are reduced each time, as it
    would hold them unsharded meanwhile.
    """
    check_batch(inputs)
    total = len(inputs["input_ids"])
    if rows is None or total <= rows:
        yield inputs
        return
    inputs = trainer._prepare_inputs(inputs)
    batch, config = trainer.global_batch, trainer.thought_config
    share = batch.next_share(config)
    model.train()
    if callable(optimizer_trains := getattr(trainer.optimizer, "train", None)):
        optimizer_trains()
    if config.thinks:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            over = model(**inputs, batch_part=share.thinking()).thought_over
    else:
        over = ThoughtOver(None, {"targets": text_batch(config, inputs, share).target_divisors})
    stays = trainer.accelerator.num_processes > 1 and not trainer.accelerator.is_fsdp2
    for start in range(0, total, rows):
        part = slice(start, min(start + rows, total))
        alone = stays and part.stop < total
        with (
            batch.part(over.part(part), (part.stop - part.start) / total),
            trainer.accelerator.no_sync(model) if alone else contextlib.nullcontext(),
        ):
            yield rows_of(inputs, part)


def rows_of(inputs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Some texts of a batch.

    Raises:
        ValueError: for an argument that does not have a row for each text.
    """
    total, found = len(inputs["input_ids"]), {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.dim() < 2 or len(value) != total:
                raise ValueError(
                    f"{name} has shape {list(value.shape)} and rows_per_backward is set; expected"
                    f" [{total}, ...], a row for each text"
                )
            value = value[rows]
        found[name] = value
    return found

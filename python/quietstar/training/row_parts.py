"""A micro-batch whose rows are learnt from a few at a time, with thoughts that were sampled for all.

The rollout keeps nothing for a backward pass, so memory allows it many rows; the packed pass keeps
every activation. With ``rows_per_backward`` the rollout takes the whole micro-batch, whose slots fill
the device, and packed and backward passes take so many rows at a time, so that they need no gradient
checkpointing. Thoughts, losses and gradients are those of the whole micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quietstar.thinking.batch_share import BatchShard
from quietstar.training.options import check_batch

if TYPE_CHECKING:
    from quietstar.training.trainer import QuietStarTrainer


def in_parts(
    trainer: QuietStarTrainer, model: nn.Module, inputs: dict[str, Any], rows: int | None
) -> Iterator[dict[str, Any]]:
    """The parts of a micro-batch to be trained on one after the other; the whole one if it has no more
    than ``rows``.

    Around all but the last gradients stay in their process.
    """
    check_batch(inputs)
    total = len(inputs["input_ids"])
    config = trainer.thought_config
    if rows is None or total <= rows or not config.thinks:
        yield inputs
        return
    inputs = trainer._prepare_inputs(inputs)
    batch = trainer.global_batch
    share = batch.next_share(config)
    model.train()
    if callable(optimizer_trains := getattr(trainer.optimizer, "train", None)):
        optimizer_trains()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        thinking = model(**inputs, batch_part=share.thinking())
    for start in range(0, total, rows):
        part = slice(start, min(start + rows, total))
        last = part.stop == total
        own = BatchShard(mean_count=_known(thinking.divisors), thoughts=thinking.thoughts.of_rows(part))
        with batch.part(own, (part.stop - part.start) / total), _alone(trainer, model, last):
            yield rows_of(inputs, part)


def _known(divisors: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, own: divisors[name]


def _alone(
    trainer: QuietStarTrainer, model: nn.Module, last: bool
) -> contextlib.AbstractContextManager[Any]:
    if last or trainer.accelerator.num_processes == 1:
        return contextlib.nullcontext()
    return trainer.accelerator.no_sync(model)


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

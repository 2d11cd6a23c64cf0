"""Numbers of a recipe that no run could do anything with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quietstar.errors import UserError

LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps",), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), 0),
    **dict.fromkeys(("max_grad_norm", "warmup_steps", "dataloader_num_workers", "seed", "data_seed"), 0),
}
ABOVE = dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), 0)
BELOW = {
    **dict.fromkeys(("adam_beta1", "adam_beta2"), 1),
    **dict.fromkeys(("seed", "data_seed"), 2**32),
    "max_steps": 2**63,
}


def check_training(training: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for a number of the section training that is out of range."""
    for key, value in training.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least, above, below = (table.get(key) for table in (LEAST, ABOVE, BELOW))
        limits = [
            (least, f"of at least {least}", least is None or value >= least),
            (above, f"above {above}", above is None or value > above),
            (below, f"below {below}", below is None or value < below),
        ]
        if any(limit is not None for limit, _, _ in limits) and not (
            math.isfinite(value) and all(fine for _, _, fine in limits)
        ):
            words = " and ".join(text for limit, text, _ in limits if limit is not None)
            raise UserError(f"training.{key} is {value!r}; expected a number {words}")
    if training.get("max_steps", -1) not in (-1, None) and training["max_steps"] < 1:
        raise UserError(
            f"training.max_steps is {training['max_steps']}; expected a whole number >= 1, or -1 to"
            " train for num_train_epochs"
        )

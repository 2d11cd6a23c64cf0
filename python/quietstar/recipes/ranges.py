"""Ranges of the numbers in a recipe's training section."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from quietstar.errors import UserError

# The ranges of settings, as an error spells them.
RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "of at least 1"),
    "gradient_accumulation_steps": "of at least 1",
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon"), "of at least 0"),
    **dict.fromkeys(("max_grad_norm", "warmup_steps", "dataloader_num_workers"), "of at least 0"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "of at least 0 and below 1"),
    **dict.fromkeys(("seed", "data_seed"), f"of at least 0 and below {2**32}"),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), "above 0"),
    "max_steps": f"below {2**63}",
}
COMPARISONS = {"of at least": operator.ge, "above": operator.gt, "below": operator.lt}


def check_training(training: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for a number of the section training that is out of range."""
    for key, words in RANGES.items():
        value = training.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        limits = [limit.rsplit(" ", 1) for limit in words.split(" and ")]
        if not math.isfinite(value) or not all(COMPARISONS[c](value, int(n)) for c, n in limits):
            raise UserError(f"training.{key} is {value!r}; expected a number {words}")
    if training.get("max_steps", -1) not in (-1, None) and training["max_steps"] < 1:
        raise UserError(
            f"training.max_steps is {training['max_steps']}; expected a whole number >= 1, or -1 to"
            " train for num_train_epochs"
        )

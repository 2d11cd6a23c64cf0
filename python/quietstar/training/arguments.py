"""Training arguments: transformers' own and what training with thoughts adds to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from quietstar.errors import UserError
from quietstar.values import typed

_RANGES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "policy_max_grad_norm": (float | None, lambda n: n is None or n > 0, "a number > 0, or null"),
    "max_skipped_steps": (int, lambda n: n >= 0, "0 or more"),
    "rows_per_backward": (int | None, lambda n: n is None or n > 0, "1 or more, or null"),
    "ema_decay": (float, lambda n: 0 <= n < 1, "a number from 0 to below 1"),
}


@dataclass
class QuietStarArguments(TrainingArguments):
    """``transformers.TrainingArguments`` and five more; ``QuietStarTrainer`` takes either kind.

    Args:
        thought_schedule: stages of training, e.g. ``[{"steps": 500, "thought_length": 9},
            {"thought_length": 5}]`` (:mod:`quietstar.training.schedule`); the same as JSON text is
            read, so that ``HfArgumentParser`` takes it from a command line.
        policy_max_grad_norm: clip the gradient of the policy term and entropy bonus to this norm, apart
            from the language-model loss, which then has ``max_grad_norm`` to itself. None: one gradient.
            Costs a second backward pass and a second gradient in memory
            (:mod:`quietstar.training.clipping`).
        max_skipped_steps: steps with a loss or gradient that is not finite are skipped; more than this
            many in a row stop the training.
        ema_decay: of the copy that the reward ``information-gain`` measures against.
        rows_per_backward: so many of a micro-batch's rows go through the differentiated pass at a time;
            thoughts are sampled for all of them at once (:mod:`quietstar.training.row_parts`). Saves
            memory without computing anything twice. None: all rows.
    """

    thought_schedule: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={"help": 'Stages of training as JSON: \'[{"steps": 500, "thought_length": 9}, {}]\'.'},
    )
    policy_max_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Clip the policy term's gradient to this norm, apart from the rest."},
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={"help": "Steps in a row that may be skipped because they are not finite."},
    )
    ema_decay: float = field(
        default=0.999,
        metadata={"help": "Decay of the averaged copy that the reward information-gain needs."},
    )
    rows_per_backward: int | None = field(
        default=None,
        metadata={"help": "Rows that go through the differentiated pass at a time; thoughts: all rows."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.thought_schedule, str):
            self.thought_schedule = _read_json("thought_schedule", self.thought_schedule)
        for name, (kind, fits, expected) in _RANGES.items():
            value = typed(name, getattr(self, name), kind)
            if not fits(value):
                raise UserError(f"{name} is {value!r}; expected {expected}")
            setattr(self, name, value)
        schedule = self.thought_schedule if isinstance(self.thought_schedule, list) else []
        stages = [stage for stage in schedule if isinstance(stage, dict)]
        plain = any(stage.get("thought_kind") == "none" for stage in stages)
        if plain and getattr(self, "ddp_find_unused_parameters", None) is None:
            # In that stage the mixing head and the thought embeddings have no gradient.
            self.ddp_find_unused_parameters: bool | None = True
        super().__post_init__()


def argument(args: TrainingArguments, name: str) -> Any:
    """One of the added arguments; its default where ``args`` are transformers' own."""
    return getattr(args, name, getattr(QuietStarArguments, name))


def _read_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is {text!r}; expected JSON: {error}") from None

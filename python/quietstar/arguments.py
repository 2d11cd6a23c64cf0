"""Training arguments: transformers' own and what training with thoughts adds to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments


@dataclass
class QuietStarArguments(TrainingArguments):
    """``transformers.TrainingArguments`` and four more; ``QuietStarTrainer`` takes either kind.

    Args:
        thought_schedule: stages of training, e.g. ``[{"steps": 500, "thought_length": 9},
            {"thought_length": 5}]`` (:mod:`quietstar.schedule`).
        policy_max_grad_norm: clip the gradient of the policy term and entropy bonus to this norm, apart
            from the language-model loss, which then has ``max_grad_norm`` to itself. None: one gradient.
            Costs a second backward pass and a second gradient in memory (:mod:`quietstar.clipping`).
        max_skipped_steps: steps with a loss or gradient that is not finite are skipped; more than this
            many in a row stop the training.
        ema_decay: of the copy that the reward ``information-gain`` measures against.
    """

    thought_schedule: list[dict[str, Any]] | None = None
    policy_max_grad_norm: float | None = None
    max_skipped_steps: int = 10
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        if self.policy_max_grad_norm is not None and not self.policy_max_grad_norm > 0:
            raise ValueError(
                f"policy_max_grad_norm is {self.policy_max_grad_norm!r}; expected a number > 0, or null"
            )
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps is {self.max_skipped_steps!r}; expected 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay!r}; expected a number from 0 to below 1")
        stages = [stage for stage in self.thought_schedule or () if isinstance(stage, dict)]
        plain = any(stage.get("thought_kind") == "none" for stage in stages)
        if plain and getattr(self, "ddp_find_unused_parameters", None) is None:
            # In that stage the mixing head and the thought embeddings have no gradient.
            self.ddp_find_unused_parameters: bool | None = True
        super().__post_init__()


def argument(args: TrainingArguments, name: str) -> Any:
    """One of the added arguments; its default where ``args`` are transformers' own."""
    return getattr(args, name, getattr(QuietStarArguments, name))

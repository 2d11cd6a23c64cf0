"""Schedule: thought settings that change while training goes on, a function of the step alone.

    training:
      thought_schedule:                 # Fast Quiet-STaR (Huang et al. 2025, arXiv 2505.17746)
        - {steps: 1000, thought_length: 13, talk_length: 8, thought_kind: sampled}
        - {steps: 500, thought_length: 9, talk_length: 4}
        - {steps: 500, thought_length: 5, talk_length: 4}
        - {thought_kind: none}          # plain next-token prediction until the end

A stage lasts ``steps`` optimiser steps, the last one until training ends. What a stage does not set
stays as in the stage before; the first stage sets everything that any stage sets. So the settings at a
step follow from the schedule, wherever a run was interrupted and whatever a checkpoint's configuration
says. (16/8, 12/4 and 8/4 in that paper are ``n_ahead`` and ``n_ahead_talk`` of the reference's counting,
which is 3 more than the sampled tokens.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from quietstar.config import QuietStarConfig, settings
from quietstar.values import typed

# Fields of the configuration that a stage may set. The reward is not among them: its averaged copy of
# the model begins with the training.
SETTABLE = (
    "thought_length", "talk_length", "num_rationales", "thought_kind", "think_at",
    "thought_temperature", "policy_weight", "nll_weight", "base_loss_weight", "entropy_bonus",
    "mixing_floor",
)  # fmt: skip


class Schedule:
    """A checked ``thought_schedule``.

    Attributes:
        starts: the step at which each stage begins.
        settings: of each stage, complete.
    """

    def __init__(self, stages: Any, config: QuietStarConfig):
        """Check the stages against the configuration that they will change.

        Raises:
            ValueError: names the stage (counted from 1) and the setting.
        """
        if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
            raise ValueError(f"thought_schedule is {stages!r}; expected a list of stages")
        self.starts: list[int] = []
        self.settings: list[dict[str, Any]] = []
        hints = settings()
        step = 0
        current: dict[str, Any] = {}
        for number, stage in enumerate(stages, 1):
            where = f"thought_schedule stage {number}"
            if not isinstance(stage, dict):
                raise ValueError(f"{where} is {stage!r}; expected a mapping such as {{steps: 100, ...}}")
            last = number == len(stages)
            steps = typed(f"{where}: steps", stage.get("steps", 1 if last else None), int)
            if steps < 1:
                raise ValueError(f"{where}: steps is {steps}; expected a whole number >= 1")
            own = {}
            for key in (key for key in stage if key != "steps"):
                if key not in SETTABLE:
                    raise ValueError(
                        f"{where} sets {key!r}; expected steps and any of {', '.join(SETTABLE)}"
                    )
                own[key] = typed(f"{where}: {key}", stage[key], hints[key])
                if number > 1 and key not in current:
                    raise ValueError(
                        f"{where} sets {key}, which stage 1 does not; set it there too, so that every"
                        " step's setting follows from the schedule"
                    )
            current = {**current, **own}
            changed = copy.copy(config)
            _set(changed, current)
            try:
                changed.check_thoughts()
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            self.starts.append(step)
            self.settings.append(current)
            step += steps

    def stage(self, step: int) -> int:
        """The stage of a step, from 0; ``step`` optimiser steps have been taken."""
        return max(i for i, start in enumerate(self.starts) if start <= step)

    def apply(self, config: QuietStarConfig, step: int) -> bool:
        """Give the configuration the settings of a step; True if that changed anything."""
        settings = self.settings[self.stage(step)]
        if all(getattr(config, key) == value for key, value in settings.items()):
            return False
        _set(config, settings)
        return True

    def describe(self, step: int) -> str:
        """One line for the log."""
        number = self.stage(step)
        settings = ", ".join(f"{key} {value}" for key, value in self.settings[number].items())
        return f"step {step}: stage {number + 1} of {len(self.starts)} ({settings})"


def longest_talk(config: QuietStarConfig, training: Mapping[str, Any]) -> int:
    """The greatest talk_length of a run with these training settings.

    Raises:
        ValueError: if its ``thought_schedule`` does not fit.
    """
    stages = training.get("thought_schedule")
    if stages is None:
        return config.talk_length
    settings = Schedule(stages, config).settings
    return max(int(stage.get("talk_length", config.talk_length)) for stage in settings)


def _set(config: QuietStarConfig, settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        setattr(config, key, value)

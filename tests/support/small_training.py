"""A small model, rows and a trainer for the tests of what the trainer does to a step."""

import copy
from pathlib import Path
from typing import Any

import torch
from families import thinking_model, tiny_decoder
from transformers import TrainerCallback

from quietstar import QuietStarForCausalLM, QuietStarTrainer
from quietstar.training.arguments import QuietStarArguments

LENGTH, THOUGHT = 10, 2


def small_model(mixing: float = 0.3, layers: int = 2, **fields: Any) -> QuietStarForCausalLM:
    settings = {"thought_length": THOUGHT, "talk_length": 2, **fields}
    return thinking_model(
        tiny_decoder("llama", vocab_size=48, num_hidden_layers=layers), mixing=mixing, **settings
    )


def rows(count: int = 32, thoughts: bool = False) -> list[dict[str, torch.Tensor]]:
    made = []
    for _ in range(count):
        ids = torch.randint(3, 30, (LENGTH,))
        row = {"input_ids": ids, "labels": ids}
        if thoughts:
            row["thought_ids"] = torch.randint(3, 30, (2, LENGTH, THOUGHT))
        made.append(row)
    return made


class InOrder(QuietStarTrainer):
    """Takes the rows in order."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(
    folder: Path, model: QuietStarForCausalLM, data: list, *callbacks: TrainerCallback, **settings: Any
) -> QuietStarTrainer:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "seed": 7}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "report_to": []}
    if "save_steps" in settings:
        defaults["save_strategy"] = "steps"
    kind = InOrder if settings.pop("in_order", False) else QuietStarTrainer
    tokenizer = settings.pop("processing_class", None)
    arguments = QuietStarArguments(
        output_dir=str(folder), disable_tqdm=True, use_cpu=True, **{**defaults, **settings}
    )
    data_sets = {"train_dataset": data, "eval_dataset": data[:4], "processing_class": tokenizer}
    return kind(model=model, args=arguments, callbacks=list(callbacks), **data_sets)


class Interrupt(TrainerCallback):
    """Stops a run by the keyboard after a step, or when one is saved."""

    def __init__(self, step: int = -1, at_save: bool = False):
        self.step, self.at_save = step, at_save

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.at_save:
            raise KeyboardInterrupt


class Snapshots(TrainerCallback):
    """Weights, optimiser state and averaged copy after every step."""

    def __init__(self, run: QuietStarTrainer) -> None:
        self.run = run
        self.steps: list[dict[str, list[torch.Tensor]]] = []
        run.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        copied = {} if self.run.ema is None else self.run.ema.values
        optimiser = kwargs["optimizer"].state_dict()["state"].values()
        parts = {
            "weights": list(kwargs["model"].state_dict().values()),
            "optimiser": [value for state in optimiser for value in state.values()],
            "copy": list(copied.values()),
        }
        self.steps.append(copy.deepcopy(parts))

    def same(self, first: int, second: int, *parts: str) -> bool:
        """Whether nothing (of these parts) has changed between two steps, counted from 0."""
        for part in parts or ("weights", "optimiser", "copy"):
            ours, theirs = self.steps[first][part], self.steps[second][part]
            if len(ours) != len(theirs) or not all(map(torch.equal, ours, theirs)):
                return False
        return True

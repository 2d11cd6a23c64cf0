"""A small model, rows and a trainer for the tests of what the trainer does to a step."""

from pathlib import Path
from typing import Any

import torch
from families import tiny_decoder

from quietstar import QuietStarForCausalLM, QuietStarTrainer
from quietstar.training.arguments import QuietStarArguments

LENGTH, THOUGHT = 10, 2


def small_model(**fields: Any) -> QuietStarForCausalLM:
    settings = {"thought_length": THOUGHT, "talk_length": 2, **fields}
    model = QuietStarForCausalLM.from_base(
        tiny_decoder("llama", vocab_size=48), start_token_id=39, end_token_id=40, **settings
    )
    with torch.no_grad():
        model.mixing_head.fc3.weight.normal_(0, 0.3)
    return model


def rows(count: int = 32, thoughts: bool = False) -> list[dict[str, torch.Tensor]]:
    made = []
    for _ in range(count):
        ids = torch.randint(3, 30, (LENGTH,))
        row = {"input_ids": ids, "labels": ids}
        if thoughts:
            row["thought_ids"] = torch.randint(3, 30, (2, LENGTH, THOUGHT))
        made.append(row)
    return made


def trainer(folder: Path, model: QuietStarForCausalLM, data: list, **settings: Any) -> QuietStarTrainer:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 3e-3}
    defaults |= {"logging_steps": 1, "save_strategy": "no"}
    arguments = QuietStarArguments(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
        **{**defaults, **settings},
    )
    return QuietStarTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])

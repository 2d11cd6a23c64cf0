"""A long run at tiny size: is the memory flat? ``python -m benchmarks.soak [STEPS]`` (default 2000).

Trains with everything that keeps state between steps switched on (sampled thoughts, logging, evaluation,
checkpoints that are rotated, texts of changing length) and samples the resident size. The verdict is the
slope over the second half, in bytes per step: a leaked graph is megabytes a step at any size, a leaked
scalar tensor hundreds of bytes.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from quietstar import QuietStarForCausalLM, QuietStarTrainer


class Resident(TrainerCallback):
    """The resident size in bytes every few steps, after a collection."""

    def __init__(self, every: int):
        self.every = every
        self.steps: list[int] = []
        self.sizes: list[int] = []
        self.tensors: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample."""
        if state.global_step % self.every:
            return
        gc.collect()
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
        self.steps.append(state.global_step)
        self.sizes.append(kib * 1024)
        self.tensors.append(sum(type(o) in (torch.Tensor, torch.nn.Parameter) for o in gc.get_objects()))


def soak(steps: int, folder: Path) -> dict[str, Any]:
    """Train; slopes over the second half in bytes and in tensors per step, and the sizes in MB."""
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    model = QuietStarForCausalLM.from_base(
        decoder, start_token_id=62, end_token_id=63, thought_length=2, think_at="random:0.5"
    )
    rows = []
    for number in range(256):
        ids = torch.randint(3, 60, (12,))
        mask = torch.ones_like(ids)
        mask[12 - number % 6 :] = 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    watch = Resident(max(1, steps // 50))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
        save_steps=max(1, steps // 10),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    run = QuietStarTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=[watch],
    )
    run.train()
    half = len(watch.steps) // 2
    at = np.array(watch.steps[half:])
    return {
        "steps": steps,
        "bytes per step": float(np.polyfit(at, np.array(watch.sizes[half:], dtype=float), 1)[0]),
        "tensors per step": float(np.polyfit(at, np.array(watch.tensors[half:], dtype=float), 1)[0]),
        "resident MB": [round(size / 1e6, 1) for size in watch.sizes[:: max(1, len(watch.sizes) // 10)]],
        "final loss": run.state.log_history[-1]["train_loss"],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = soak(int(sys.argv[1]) if len(sys.argv) > 1 else 2000, Path(place))
    print(json.dumps(found, indent=1))

"""Run by test_distributed.py: ``torchrun --nproc-per-node 2 two_processes.py OUT``, gloo on the CPU.

Each case trains a tiny model with QuietStarTrainer and leaves what came out of it in OUT as safetensors
(process 0 alone). The same functions run in one process, on the whole batch, inside the test.
"""

import faulthandler
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_deepspeed_available, is_peft_available
from families import thinking_model, tiny_decoder
from safetensors.torch import save_file
from small_training import trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from quietstar import QuietStarForCausalLM, QuietStarTrainer
from quietstar.checkpoints.adapters import add_adapters

ROWS, LENGTH = 16, 11
TOO_LONG = 420  # seconds; processes that wait for each other say where, before pytest's limit ends them
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
KEEP_PRODUCTS = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"keep": "products"},
}
CASES: dict[str, dict[str, Any]] = {
    # 2 processes x 2 rows; rows of different lengths, so that the counts of the parts differ.
    "ddp": {"padded": True},
    "fsdp": {"padded": True, "arguments": FSDP},
    "fsdp-tied": {"padded": True, "arguments": FSDP, "tied": True, "think_at": "stride:2"},
    # No padding: two processes then draw the very thoughts that one would.
    "ddp-drawn": {"think_at": "random:0.5", "thoughts": False},
    # The counts of both micro-batches on both processes are known before the first.
    "ddp-accumulated": {"padded": True, "accumulate": 2},
    "fsdp-accumulated": {"padded": True, "accumulate": 2, "arguments": FSDP},
    # The second process has no target in the first step, and nobody in the second.
    "ddp-targets": {
        "padded": True,
        "without": range(2, 8),
        "think_at": "entropy:0.5",
        "fields": {"reward": "information-gain", "entropy_bonus": 0.3},
    },
    # Rows with one, two or no completion; the counts of all are known before the pass.
    "ddp-completion": {"padded": True, "accumulate": 2, "think_at": "completion", "completions": True},
    "fsdp-loss": {"padded": True, "think_at": "loss:3.5:4.2", "arguments": FSDP},
    # Each process learns from its two rows one after the other.
    "ddp-row-parts": {
        "think_at": "random:0.5",
        "thoughts": False,
        "arguments": {"rows_per_backward": 1},
    },
    "fsdp-row-parts": {
        "padded": True,
        "accumulate": 2,
        "fields": {"reward": "information-gain"},
        "arguments": {**FSDP, "rows_per_backward": 1},
    },
    # Two gradients, each clipped: what one part leaves must not get into the other's norm.
    "fsdp-clipped-parts": {
        "padded": True,
        "accumulate": 2,
        "settings": {"policy_max_grad_norm": 0.1, "max_grad_norm": 0.5},
        "arguments": {**FSDP, "rows_per_backward": 1},
    },
    "fsdp-targets": {"padded": True, "without": range(2, 8), "arguments": FSDP},
    # Hybrids, of every kind of layer one: documents and padding begin with a state of zero, what a layer
    # keeps is computed again, and updates of low rank reach it.
    "fsdp-lfm2": {
        **{"family": "lfm2", "padded": True, "documents": True, "accumulate": 2},
        "arguments": {**FSDP, "rows_per_backward": 1},
    },
    "fsdp-qwen3_5": {"family": "qwen3_5_text", "padded": True, "arguments": {**FSDP, **KEEP_PRODUCTS}},
    "ddp-bamba": {
        **{"family": "bamba", "padded": True, "adapters": True},
        "arguments": {"rows_per_backward": 1, **KEEP_PRODUCTS},
    },
    "ddp-kimi": {"family": "kimi_linear", "padded": True, "documents": True, "accumulate": 2},
}


# A run of four steps that is saved after two, in one process and in two, and continued in the other.
SAVED: dict[str, dict[str, Any]] = {
    "ddp": {"think_at": "random:0.5", "thoughts": False},
    "fsdp": {"think_at": "random:0.5", "thoughts": False, "arguments": FSDP, "tied": True},
}
# The same with an averaged copy to measure against, two gradients clipped apart, and an entropy bonus.
OBJECTIVE: dict[str, Any] = {
    "fields": {"reward": "information-gain", "entropy_bonus": 0.3},
    "settings": {"policy_max_grad_norm": 0.1, "max_grad_norm": 0.5, "ema_decay": 0.5},
    "accumulate": 2,
}
SAVED |= {
    "ddp-objective": {"padded": True, **OBJECTIVE},
    "fsdp-objective": {"padded": True, "arguments": FSDP, "tied": True, **OBJECTIVE},
}
# DeepSpeed keeps gradients to itself, so its weights are compared; plain steps do not magnify rounding.
ZERO: dict[str, dict[str, Any]] = {
    f"zero-{stage}": {
        "padded": True,
        "settings": {"optim": "sgd", "max_grad_norm": 1.0},
        "arguments": {
            "deepspeed": {
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
            }
        },
    }
    for stage in (1, 2)
}
SAVING: dict[str, Any] = {"steps": 4, "save_strategy": "steps", "save_steps": 2}


def build(case: dict[str, Any]) -> QuietStarForCausalLM:
    family, tied = case.get("family", "llama"), case.get("tied", False)
    decoder = tiny_decoder(family, vocab_size=48, tie_word_embeddings=tied)
    fields = {"thought_length": 2, "talk_length": 2, "policy_weight": 3.0, **case.get("fields", {})}
    model = thinking_model(decoder, mixing=0.3, think_at=case.get("think_at", "all"), **fields)
    if case.get("adapters"):
        model = add_adapters(model, "nowhere", rank=2, alpha=4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # an update of zero would hide the other factor
                    parameter.normal_(0, 0.1)
    return model


def rows(case: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(ROWS):
        ids = torch.randint(3, 30, (LENGTH,), generator=generator)
        mask = torch.ones_like(ids)
        if case.get("padded"):
            mask[LENGTH - number % 5 :] = 0
        row = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        if case.get("documents"):
            row["document_ids"] = (torch.arange(LENGTH) > number % 5).long()
        if case.get("completions"):
            row["completion_anchors"] = torch.tensor([1, 4][: number % 3])
        if number in case.get("without", ()):
            row["labels"] = torch.full_like(ids, -100)
        if case.get("thoughts", True):
            row["thought_ids"] = torch.randint(3, 30, (2, LENGTH, 2), generator=generator)
        made.append(row)
    return made


@contextmanager
def fsdp_on_the_cpu(wanted: bool) -> Iterator[None]:
    """accelerate leaves FSDP out where there is no accelerator; here it has to take it."""
    AcceleratorState._reset_state()
    original = AcceleratorState.__init__

    def patched(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and kwargs.get("fsdp_plugin"):
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]

    if wanted:
        AcceleratorState.__init__ = patched
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


class Gradients(TrainerCallback):
    """Keeps every step's gradients, whole."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {}
        for name, parameter in kwargs["model"].named_parameters():
            if not parameter.requires_grad:
                continue  # frozen
            gradient = parameter.grad
            if gradient is None:
                assert not found, name  # a step without a target has none at all
                return
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            found[name.removeprefix("module.")] = gradient.detach().clone()
        self.steps.append(found)


def train(
    case: dict[str, Any],
    folder: Path,
    *,
    batch: int,
    steps: int = 2,
    resume: bool = False,
    callbacks: tuple[TrainerCallback, ...] = (),
    **more: Any,
) -> tuple[QuietStarTrainer, Gradients]:
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": case.get("accumulate", 1),
        "learning_rate": 1e-2,
        # Near zero Adam's step is the gradient's sign, so the last bit of a gradient that nearly cancels
        # would decide it; with this much in the denominator a step is about linear in the gradient.
        "adam_epsilon": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": 3,
        "in_order": "without" in case,
        **{**more, **case.get("settings", {}), **case.get("arguments", {})},
    }
    gradients = Gradients()
    watching = (*callbacks,) if "deepspeed" in case.get("arguments", {}) else (gradients, *callbacks)
    wants_fsdp = "fsdp" in case.get("arguments", {})
    with fsdp_on_the_cpu(wants_fsdp):
        run = trainer(folder, build(case), rows(case), *watching, **settings)
    assert run.is_fsdp_enabled == wants_fsdp
    run.train(resume_from_checkpoint=True if resume else None)
    assert wants_fsdp == all(isinstance(p, DTensor) for p in run.model.parameters())
    return run, gradients


def alone(case: dict[str, Any], folder: Path, **more: Any) -> tuple[QuietStarTrainer, Gradients]:
    """The same in one process on the whole batch."""
    plain = {key: value for key, value in case.items() if key not in ("arguments", "accumulate")}
    return train(plain, folder, batch=4 * case.get("accumulate", 1), **more)


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("c10d."):
            self.counts[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(case: dict[str, Any], folder: Path) -> dict[str, int]:
    """The collectives of forward and backward in the second training step."""
    watch = Collectives()

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                watch.__enter__()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                watch.__exit__(None, None, None)

    train(case, folder, batch=2, callbacks=(Watch(),))
    return dict(watch.counts)


def main(out: Path) -> None:
    import json

    faulthandler.dump_traceback_later(TOO_LONG, exit=True)
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if "adapters" in case and not is_peft_available():
            continue
        run, gradients = train(case, out / f"run-{name}", batch=2)
        if rank == 0:
            for step, found in enumerate(gradients.steps):
                save_file(found, out / f"{name}-gradients-{step}.safetensors")
            losses = [e["loss"] for e in run.state.log_history if "loss" in e]
            counted = [e["steps_without_targets"] for e in run.state.log_history if "loss" in e]
            assert counted == ([0, 1] if "without" in case else [0, 0]), counted
            assert len(gradients.steps) == (1 if "without" in case else 2)
            (out / f"{name}-losses.json").write_text(json.dumps(losses))
    for name, case in SAVED.items():
        run, _ = train(case, out / f"two-{name}", batch=2, **SAVING)
        keep(whole_weights(run), out / f"two-{name}.safetensors", rank)
        run, _ = train(case, out / f"one-two-{name}", batch=2, resume=True, **SAVING)
        keep(whole_weights(run), out / f"one-two-{name}.safetensors", rank)
    collectives = {
        name: count_collectives({**CASES["fsdp"], **changes}, out / "counted")
        for name, changes in {"forced": {}, "sampled": {"thoughts": False}}.items()
    }
    for name, case in ZERO.items() if is_deepspeed_available() else ():
        found = {
            "change": train_with_deepspeed(case, out / f"run-{name}"),
            "skipped": skipped_by_deepspeed(case, out / f"poisoned-{name}"),
        }
        if rank == 0:
            (out / f"{name}.json").write_text(json.dumps(found))
    if rank == 0:
        (out / "collectives.json").write_text(json.dumps(collectives))
    torch.distributed.destroy_process_group()


class Poison(TrainerCallback):
    """Makes the output layer's gradient NaN in the second step."""

    def __init__(self) -> None:
        self.step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weight = next(p for n, p in kwargs["model"].named_parameters() if n.endswith("lm_head.weight"))
        weight.register_hook(lambda g: g * float("nan") if self.step == 1 else g)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def skipped_by_deepspeed(case: dict[str, Any], folder: Path) -> int:
    """How many steps were skipped of four with one that is poisoned; the weights stay finite."""
    run, _ = train(case, folder, batch=2, steps=4, callbacks=(Poison(),))
    assert all(weight.isfinite().all() for weight in whole_weights(run).values())
    return run.guard.skipped


def train_with_deepspeed(case: dict[str, Any], folder: Path) -> float:
    """A run of four steps, and by how much its last two, done again from its checkpoint, differ."""
    first, _ = train(case, folder, batch=2, **SAVING)
    assert first.is_deepspeed_enabled
    again = folder.with_name(f"{folder.name}-again")
    if first.is_world_process_zero():
        shutil.copytree(folder / "checkpoint-2", again / "checkpoint-2")
    torch.distributed.barrier()
    second, _ = train(case, again, batch=2, resume=True, **SAVING)
    found = whole_weights(second)
    return max(float((found[n] - p).abs().max()) for n, p in whole_weights(first).items())


def whole_weights(run: QuietStarTrainer) -> dict[str, torch.Tensor]:
    model: nn.Module = run.accelerator.unwrap_model(run.model)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def keep(weights: dict[str, torch.Tensor], path: Path, rank: int) -> None:
    if rank == 0:
        save_file(weights, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

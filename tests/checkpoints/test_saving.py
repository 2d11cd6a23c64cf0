"""Checkpoints: what they hold, what is unpickled (nothing), full disks, read-only folders."""

import json
import logging
import pickle
import resource
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_training
import torch
from small_training import small_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from quietstar import QuietStarForCausalLM, QuietStarTrainer, files
from quietstar.checkpoints.folder import refuse_pickles, rotate, sweep
from quietstar.checkpoints.state import (
    load_optimizer_state,
    optimizer_state,
    parameter_names,
    random_state,
    set_random_state,
    write_tensors,
)
from quietstar.errors import UserError
from quietstar.recipes import disk


def trainer(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> QuietStarTrainer:
    ids = torch.randint(3, 9, (32, 10), generator=torch.Generator().manual_seed(4))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    # No logs: what is printed may go to a file that may not grow.
    fixed = {"max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 500}
    return small_training.trainer(folder, small_model(), rows, *callbacks, **{**fixed, **settings})


class DiskFull(TrainerCallback):
    """No file may grow beyond 4 KB between two steps: the system's own error, as a full disk gives."""

    def __init__(self, first: int, last: int):
        self.steps = range(first, last + 1)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self.before[1]))
        else:
            self.over()

    def over(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@contextmanager
def full_disk(first: int, last: int) -> Iterator[DiskFull]:
    callback = DiskFull(first, last)
    try:
        yield callback
    finally:
        callback.over()


def weights(run: QuietStarTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def test_a_save_that_fails_is_tried_again(tmp_path, caplog):
    whole = trainer(tmp_path / "whole")
    whole.train()
    with full_disk(4, 6) as full, caplog.at_level(logging.WARNING, "quietstar"):
        run = trainer(tmp_path / "full", full)
        run.train()
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["checkpoint-7", "checkpoint-8"]
    said = [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()]
    assert [m.rpartition(" ")[2] for m in said] == ["5", "7"] and "checkpoint-4" in said[0]
    theirs = weights(run)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(whole).items())


@pytest.mark.slow
def test_it_gives_up_and_keeps_what_is_there(tmp_path):
    with full_disk(3, 100) as full:
        run = trainer(tmp_path, full, max_steps=40, save_steps=2)
        with pytest.raises(UserError, match=r"checkpoints cannot be written to .*5 attempts failed"):
            run.train()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    again = trainer(tmp_path, max_steps=4, save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something is being unpickled")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(owner, name, refuse)
    trainer(tmp_path, max_steps=4).train()
    folder = tmp_path / "checkpoint-4"
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=True)
    QuietStarForCausalLM.from_pretrained(folder)


def test_weights_are_read_from_safetensors_alone(tmp_path):
    """A folder from the hub may hold a pickle beside nothing else; it is never opened."""
    model = small_model()
    model.save_pretrained(tmp_path / "ours")
    model.base.save_pretrained(tmp_path / "base")
    for folder in ("ours", "base"):
        (tmp_path / folder / "model.safetensors").unlink()
        (tmp_path / folder / "pytorch_model.bin").write_bytes(pickle.dumps(nn.Linear(1, 1).state_dict()))
    with pytest.raises(OSError, match="safetensors"):
        QuietStarForCausalLM.from_pretrained(tmp_path / "ours")
    with pytest.raises(OSError, match="safetensors"):
        QuietStarForCausalLM.from_base(str(tmp_path / "base"), start_token_id=1, end_token_id=2)


def test_a_checkpoint_with_pickles_is_refused(tmp_path):
    trainer(tmp_path, max_steps=2, save_steps=2).train()
    (tmp_path / "checkpoint-2" / "scheduler.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="holds scheduler.pt, which would have to be unpickled"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    for name in ("pytorch_model.bin", "optimizer.pt", "rng_state_1.pth", "adapter_model.bin"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        with pytest.raises(UserError, match=name):
            refuse_pickles(folder)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw", "adafactor"])
def test_optimizer_state_there_and_back(tmp_path, kind: str):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False))
        groups = [
            {"params": list(model[1].parameters()), "weight_decay": 0.0},
            {"params": model[0].weight},
        ]
        make = {
            "sgd": lambda: torch.optim.SGD(groups, lr=0.1),
            "momentum": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9)),
            "adafactor": lambda: torch.optim.Adafactor(groups, lr=0.1),
        }
        return model, make[kind]()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.05
    write_tensors(*optimizer_state(optimizer, parameter_names(model), keep=True), tmp_path / "o")
    other, fresh = build()
    other.load_state_dict(model.state_dict())
    load_optimizer_state(fresh, parameter_names(other), tmp_path / "o")
    step(model, optimizer)
    step(other, fresh)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    strange = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(ValueError, match="does not fit: parameter '1.weight' is only in one"):
        load_optimizer_state(
            torch.optim.SGD([strange[0].weight]), parameter_names(strange), tmp_path / "o"
        )


def test_random_states_there_and_back():
    import random

    import numpy as np

    kept = json.loads(json.dumps(random_state(cuda=False)))
    np.random.standard_normal()  # leaves a second number behind
    drawn = []
    for _ in range(2):
        set_random_state(kept)
        drawn.append((random.random(), np.random.standard_normal(), float(torch.rand(()))))
    assert drawn[0] == drawn[1]


def test_old_checkpoints_go_but_not_the_best(tmp_path):
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "incomplete-checkpoint-14").mkdir()
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert {p.name for p in tmp_path.glob("checkpoint*")} == {"checkpoint-2", "checkpoint-12"}
    rotate(tmp_path, 1, None)
    assert {p.name for p in tmp_path.glob("checkpoint*")} == {"checkpoint-12"}
    rotate(tmp_path, None, None)
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-12"]
    refuse_pickles(tmp_path / "checkpoint-12")


class TestDisk:
    def test_a_folder_that_cannot_be_written(self, tmp_path):
        with pytest.raises(UserError, match=r"output folder /proc/.* cannot be written to"):
            files.check_writable(Path("/proc/quietstar/run"))
        files.check_writable(tmp_path / "a" / "b")
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_without_room(self, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 0, 40 * 10**9))

        def arguments(**more: Any) -> TrainingArguments:
            return TrainingArguments(str(tmp_path), max_steps=1000, save_steps=100, **more)

        disk.check_room(tmp_path / "x", arguments(save_total_limit=2), 3 * 10**9, 12 * 10**9)
        with pytest.raises(UserError, match=r"123 GB are needed \(10 checkpoints of 12 GB at once"):
            disk.check_room(tmp_path / "x", arguments(), 3 * 10**9, 12 * 10**9)
        with pytest.raises(UserError, match=r"51 GB are needed .*save_total_limit \(now 3\)"):
            disk.check_room(tmp_path / "x", arguments(save_total_limit=3), 3 * 10**9, 12 * 10**9)
        disk.check_room(tmp_path / "x", arguments(save_strategy="no"), 3 * 10**9, 12 * 10**9)

    def test_the_estimate_is_what_is_written(self, tmp_path):
        run = trainer(tmp_path, max_steps=4)
        expected = disk.checkpoint_bytes(run.model, str(run.args.optim.value))
        run.train()
        folder = tmp_path / "checkpoint-4"
        written = (folder / "model.safetensors").stat().st_size
        assert 1 <= written / expected[0] < 1.1
        tensors = written + (folder / "optimizer.safetensors").stat().st_size
        assert 0.95 < tensors / expected[1] < 1.15

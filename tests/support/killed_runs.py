"""Run by test_killed.py: ``python killed_runs.py FOLDER``. Trains, is killed, trains on, and again.

Each run of ``quietstar train`` is a forked child (with one thread, which makes forking safe), so that
the imports are paid once. A child is killed with SIGKILL, by itself at a named place or from outside
after a random time; the next child continues. What came out is written to FOLDER/results.json.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_recipes import content

import quietstar.checkpoints.save
import quietstar.recipes.run  # noqa: F401 - paid before the forks
import quietstar.training.trainer  # noqa: F401
from quietstar.checkpoints import state as plain_state
from quietstar.cli import app as cli

RECIPE = content(
    # 5 steps to an epoch, so that runs stop within the second as well.
    data={"eval_blocks": 2},
    thoughts={"talk_length": 2, "think_at": "random:0.5"},
    training={
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "save_steps": 3,
        "save_total_limit": 1,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
    },
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, call: int, *, after: bool = False) -> Callable[[], None]:
    """Die at the given call (from 1) of a function, before it or after it."""

    def arm() -> None:
        original, calls = getattr(owner, name), [0]

        def armed(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == call and not after:
                die()
            result = original(*args, **kwargs)
            if calls[0] == call:
                die()
            return result

        setattr(owner, name, armed)

    return arm


def half_written(call: int) -> Callable[[], None]:
    """Die with half of an optimiser's file on the disk."""

    def arm() -> None:
        original, calls = plain_state.save_file, [0]

        def armed(tensors: Any, path: Any, **kwargs: Any) -> None:
            original(tensors, path, **kwargs)
            calls[0] += 1
            if calls[0] == call:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
                die()

        plain_state.save_file = armed

    return arm


# Files appear through os.replace: run.json, recipe.yaml, then the final model's and metrics.json.
POINTS: dict[str, Callable[[], None]] = {
    "before run.json is there": at(os, "replace", 1),
    "before recipe.yaml is there": at(os, "replace", 2),
    "in the second step": at(torch.optim.AdamW, "step", 2),
    "in the fifth step": at(torch.optim.AdamW, "step", 5),
    "before the first optimiser file": at(plain_state, "write_tensors", 1),
    "in the second optimiser file": half_written(2),
    "before the first checkpoint has its name": at(quietstar.checkpoints.save, "publish", 1),
    "before the second checkpoint has its name": at(quietstar.checkpoints.save, "publish", 2),
    "when the second has its name": at(quietstar.checkpoints.save, "publish", 2, after=True),
    "when an old checkpoint is being deleted": at(shutil, "rmtree", 3),
    "before the model's first file is there": at(os, "replace", 3),
    "before the model's second file is there": at(os, "replace", 4),
    "before the metrics are there": at(quietstar.recipes.run, "write_json", 1),
}


def train(folder: Path, output: Path, arm: Callable[[], None] | None = None, seconds: float = 0) -> int:
    """A child that trains; returns how it ended (negative: the signal)."""
    pid = os.fork()
    if pid == 0:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if arm is not None:
            arm()
        code = cli.main(["train", str(folder / "recipe.yaml"), "--output", str(output), "--quiet"])
        os._exit(code)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state(output: Path) -> dict[str, Any]:
    """All that a finished run has learned, to the bit."""
    checkpoint = output / "checkpoint-8"
    files = [output / "model.safetensors"]
    files += [checkpoint / name for name in ("model.safetensors", "optimizer.safetensors")]
    files += [checkpoint / name for name in ("scheduler.json", "rng_state.json")]
    logged = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    kept = ("step", "loss", "eval_loss", "base_loss", "grad_norm")
    return {
        "files": {f"{p.parent.name}/{p.name}": p.read_bytes() for p in files[1:]},
        "model": files[0].read_bytes(),
        "logged": [{k: entry[k] for k in kept if k in entry} for entry in logged if "loss" in entry],
        "evaluation": json.loads((output / "metrics.json").read_text())["evaluation"],
        "left over": sorted(
            p.name for p in output.iterdir() if "incomplete" in p.name or ".new" in p.name
        ),
        "checkpoints": sorted(p.name for p in output.glob("checkpoint-*")),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    started = time.monotonic()
    assert train(folder, folder / "whole") == 0, (folder / "log.txt").read_text()
    took = time.monotonic() - started
    whole = state(folder / "whole")
    results: dict[str, dict[str, Any]] = {}

    def finish(name: str, output: Path, ends: list[int]) -> None:
        seen = sorted(p.name for p in output.glob("*checkpoint-*")) if output.is_dir() else []
        ends.append(train(folder, output))
        found = state(output) if ends[-1] == 0 else {}
        different = [key for key in whole if found.get(key) != whole[key]]
        results[name] = {"ends": ends, "seen": seen, "different": different}

    for number, (name, arm) in enumerate(POINTS.items()):
        output = folder / f"point-{number}"
        finish(name, output, [train(folder, output, arm)])
    for number in range(3):
        output, ends = folder / f"random-{number}", []
        for _ in range(3):
            ends.append(train(folder, output, seconds=random.uniform(0.05, 0.8) * took))
        finish(f"random {number}", output, ends)
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

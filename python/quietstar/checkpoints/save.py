"""Checkpoints that exist as a whole or not at all.

A checkpoint is written to ``incomplete-checkpoint-N``, flushed to the disk and renamed; the rename is
the moment at which it exists. Old ones are renamed before they are deleted. So a folder called
``checkpoint-N`` is complete whenever the process was killed, and what is called ``incomplete-`` is swept
away at the next start. Everything in one is safetensors or JSON (:mod:`quietstar.checkpoints.weights`,
:mod:`quietstar.checkpoints.state`), whole, and the same for any number of processes. A save that fails
(a full disk) is tried again while training goes on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from quietstar.checkpoints.folder import empty_folder, publish
from quietstar.errors import UserError
from quietstar.files import INCOMPLETE

logger = logging.getLogger("quietstar")

STATE_FILE = "trainer_state.json"
# Where the state of the training has the counts that a resumed run takes up.
COUNTS = "QuietStarTrainer"
# Failed saves in a row that are put up with; the pauses between them double, in steps: 1, 2, 4, 8.
SAVE_ATTEMPTS = 5


class CheckpointWriter:
    """Writes the checkpoints of a run; every process has one and calls it at the same steps.

    Args:
        writes: whether this process writes what all of them have; the others take part in gathering.
    """

    def __init__(self, accelerator: Accelerator, writes: bool):
        self._accelerator = accelerator
        self._writes = writes
        self._failed = 0
        self._retry_at: int | None = None

    def retry_is_due(self, step: int) -> bool:
        """Whether a save has failed and is to be tried again after this step."""
        return self._retry_at is not None and step >= self._retry_at

    def write(
        self,
        run: Path,
        state: TrainerState,
        parts: Iterable[Callable[[str], None]],
        stateful: Iterable[Any],
        counts: dict[str, int],
    ) -> Path | None:
        """Write ``checkpoint-N`` of the state's step; None if it has to be tried again later.

        Args:
            run: the folder of the checkpoints.
            parts: each writes its files into a folder; on every process.
            stateful: callbacks and control, of which the exportable ones go into the state's file.
            counts: what a resumed run goes on counting, see :func:`saved_count`.

        Raises:
            UserError: after ``SAVE_ATTEMPTS`` failures in a row.
        """
        final = run / f"checkpoint-{state.global_step}"
        scratch = run / f"{INCOMPLETE}{final.name}"
        problem = _tried(lambda: empty_folder(scratch)) if self._writes else None
        self._accelerator.wait_for_everyone()
        # A process that cannot write goes on: the others wait for it in the gathering of the next part.
        for part in parts:
            problem = _tried(partial(part, str(scratch))) or problem
        _note_best(state, run, final)

        def complete() -> None:
            _note_callbacks(state, stateful)
            state.stateful_callbacks[COUNTS] = {"attributes": counts}
            state.save_to_json(str(scratch / STATE_FILE))
            publish(scratch, final)

        if self._writes and problem is None:
            problem = _tried(complete)
        if self._on_any_process(problem is not None):
            if self._writes:
                shutil.rmtree(scratch, ignore_errors=True)
            self._retry_later(state.global_step, final, problem)
            return None
        self._failed, self._retry_at = 0, None
        return final

    def _on_any_process(self, flag: bool) -> bool:
        if self._accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flags, reduction="sum") > 0)

    def _retry_later(self, step: int, final: Path, problem: BaseException | None) -> None:
        self._failed += 1
        why = " ".join(str(problem or "another process could not write").split())
        if self._failed >= SAVE_ATTEMPTS:
            raise UserError(
                f"checkpoints cannot be written to {final.parent}: {SAVE_ATTEMPTS} attempts failed, the"
                f" last with: {why}; free some space and run the same command again; it continues from"
                " the last complete checkpoint"
            )
        self._retry_at = step + 2 ** (self._failed - 1)
        logger.warning(
            "%s could not be written (%s); training goes on, the next attempt is at step %d",
            final.name,
            why,
            self._retry_at,
        )


def _tried(write: Callable[[], None]) -> BaseException | None:
    try:
        write()
    except (OSError, SafetensorError) as error:
        return error
    return None


def _note_best(state: TrainerState, run: Path, final: Path) -> None:
    if state.best_global_step:
        best = run / f"checkpoint-{state.best_global_step}"
        if best == final or best.exists():
            state.best_model_checkpoint = str(best)


def _note_callbacks(state: TrainerState, stateful: Iterable[Any]) -> None:
    """As transformers' Trainer does before it saves its state."""
    for callback in stateful:
        if isinstance(callback, ExportableState):
            name = type(callback).__name__
            if isinstance(state.stateful_callbacks.get(name), list):
                state.stateful_callbacks[name].append(callback.state())
            else:
                state.stateful_callbacks[name] = callback.state()


def saved_count(state: TrainerState, name: str) -> int:
    """A count of the training so far; of a checkpoint that has none, the last in the log, or 0."""
    counts: dict[str, Any] = state.stateful_callbacks.get(COUNTS, {}).get("attributes", {})
    if name in counts:
        return int(counts[name])
    logged = [entry[name] for entry in state.log_history if name in entry]
    return int(logged[-1]) if logged else 0


def checkpoint_to_resume(asked: Any, run: str | None) -> Any:
    """What ``train`` was asked to resume from, the last checkpoint of the run for True.

    Raises:
        UserError: if it is no folder.
    """
    if asked is True:
        return get_last_checkpoint(run) or True
    if asked and not Path(asked).is_dir():
        raise UserError(
            f"resume_from_checkpoint is {str(asked)!r}, which is not a folder; expected a checkpoint"
        )
    return asked

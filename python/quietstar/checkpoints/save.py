"""Checkpoints that are there whole or not at all.

A checkpoint is written to ``incomplete-checkpoint-N``, flushed to the disk and renamed; the rename is
the moment at which it exists. Old ones are renamed before they are deleted. So a folder called
``checkpoint-N`` is complete whenever the process was killed, and what is called ``incomplete-`` is swept
away at the next start. Everything in one is safetensors or JSON (:mod:`quietstar.checkpoints.state`),
whole, and the same for any number of processes. A save that fails (a full disk) is tried again while
training goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from quietstar.checkpoints.folder import empty_folder, publish, refuse_pickles, rotate, sweep
from quietstar.checkpoints.state import (
    OPTIMIZER_FILE,
    check_plain,
    like,
    load_optimizer_state,
    optimizer_state,
    parameter_names,
    random_state,
    set_random_state,
    whole,
    write_tensors,
)
from quietstar.errors import UserError
from quietstar.files import INCOMPLETE
from quietstar.thinking.fsdp2 import put_shards_back

logger = logging.getLogger("quietstar")

DATA_FILE = "data_position.json"
SCHEDULER_FILE, SCALER_FILE = "scheduler.json", "scaler.json"
RNG_FILE, STATE_FILE = "rng_state.json", "trainer_state.json"
# Where the state of the training has what :meth:`SafeCheckpoints.counts_to_save` counts.
COUNTS = "QuietStarTrainer"
# Failed saves in a row that are put up with; the pauses between them double, in steps: 1, 2, 4, 8.
SAVE_ATTEMPTS = 5
_WRITING_FAILED = (OSError, SafetensorError)


class SafeCheckpoints(Trainer):
    """A Trainer whose checkpoints are complete, plain data, and fit any number of processes."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._failed_saves = 0
        self._save_again_at: int | None = None
        self._random_state_from: str | None = None
        self.add_callback(_SaveAgain(self))

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Sweep up what an interrupted save has left, then train."""
        if self.args.should_save:
            sweep(Path(self.args.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        elif resume_from_checkpoint and not Path(resume_from_checkpoint).is_dir():
            raise UserError(
                f"resume_from_checkpoint is {str(resume_from_checkpoint)!r}, which is no folder;"
                " expected a checkpoint"
            )
        seeks = self._seek_data(resume_from_checkpoint)
        skips, self.args.ignore_data_skip = (
            self.args.ignore_data_skip,
            (self.args.ignore_data_skip or seeks),
        )
        self._random_state_from = str(resume_from_checkpoint) if seeks else None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.args.ignore_data_skip = skips

    def _seek_data(self, checkpoint: Any) -> bool:
        """Set a streamed data set to a checkpoint's place, so that nothing has to be skipped."""
        path = Path(str(checkpoint)) / DATA_FILE
        if not isinstance(checkpoint, str | Path) or not path.is_file():
            return False
        data: Any = self.train_dataset
        if not hasattr(data, "seek") or self.args.dataloader_num_workers:
            return False
        data.seek(json.loads(path.read_text()))
        return True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step; opening the loader has drawn a random number."""
        found = super().get_batch_samples(*args, **kwargs)
        if self._random_state_from is not None:
            self._load_rng_state(self._random_state_from)
            self._random_state_from = None
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was interrupted behind its last step would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- writing --------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        scratch = run / f"{INCOMPLETE}{final.name}"
        if trial is None:
            self.store_flos()
        problem = self._tried(lambda: empty_folder(scratch) if self.args.should_save else None)
        self.accelerator.wait_for_everyone()
        parts: list[Callable[[], None]] = [lambda: self.save_model(str(scratch), _internal_call=True)]
        if not self.args.save_only_model:
            parts.append(lambda: self._save_optimizer_and_scheduler(str(scratch)))
            parts.append(lambda: self._save_scaler(str(scratch)))
            parts.append(lambda: self._save_rng_state(str(scratch)))
            parts.append(lambda: self._save_data_position(scratch))
        # A process that cannot write goes on: the others wait for it in the gathering of the next part.
        for part in parts:
            problem = self._tried(part) or problem
        self._note_best(run, final)
        if self.args.should_save and problem is None:
            problem = self._tried(lambda: self._complete(scratch, final))
        if self._any(problem is not None):
            if self.args.should_save:
                shutil.rmtree(scratch, ignore_errors=True)
            self._save_later(final, problem)
            return
        self._failed_saves, self._save_again_at = 0, None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _complete(self, scratch: Path, final: Path) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                known = self.state.stateful_callbacks.get(type(callback).__name__)
                if isinstance(known, list):
                    known.append(callback.state())
                else:
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.stateful_callbacks[COUNTS] = {"attributes": self.counts_to_save()}
        self.state.save_to_json(str(scratch / STATE_FILE))
        publish(scratch, final)

    def counts_to_save(self) -> dict[str, int]:
        """What has been counted since the training began and goes on in a resumed run, by name."""
        return {}

    def _load_callback_state(self) -> None:
        """As transformers', which would look for a callback of the counts' name."""
        counts = self.state.stateful_callbacks.pop(COUNTS, None)
        super()._load_callback_state()
        if counts is not None:
            self.state.stateful_callbacks[COUNTS] = counts

    def _note_best(self, run: Path, final: Path) -> None:
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)

    def _tried(self, part: Callable[[], None]) -> BaseException | None:
        try:
            part()
        except _WRITING_FAILED as error:
            return error
        return None

    def _any(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, reduction="sum") > 0)

    def _save_later(self, final: Path, problem: BaseException | None) -> None:
        self._failed_saves += 1
        why = " ".join(str(problem or "another process could not write").split())
        if self._failed_saves >= SAVE_ATTEMPTS:
            raise UserError(
                f"checkpoints cannot be written to {final.parent}: {SAVE_ATTEMPTS} attempts failed, the"
                f" last with: {why}; make room and give the same command again, it continues from the"
                " last complete checkpoint"
            )
        pause = 2 ** (self._failed_saves - 1)
        self._save_again_at = self.state.global_step + pause
        logger.warning(
            "%s could not be written (%s); training goes on, the next attempt is at step %d",
            final.name,
            why,
            self._save_again_at,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', but whole under FSDP whatever its state dict type is."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        gathered: dict[int, Tensor] = {}
        weights: dict[str, Tensor] = {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in self.model.state_dict().items():
            # Tied weights are one parameter under two names, and have to stay one tensor.
            key = id(parameters.get(name, value))
            if key not in gathered:
                gathered[key] = whole(value)
            if self.args.should_save:
                weights[name] = gathered[key]
            else:
                gathered[key] = torch.empty(0)
        self._save(output_dir, state_dict=weights)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with _without_embeddings(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            inside = self.accelerator.unwrap_model(self.model)
            if hasattr(inside, "peft_config"):
                inside.config.save_pretrained(output_dir or self.args.output_dir)
            # Pickled, never read by anything here, and the recipe says all of it.
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        tensors, meta = optimizer_state(
            self._plain_optimizer(), self._parameter_names(), keep=self.args.should_save
        )
        if self.args.should_save:
            write_tensors(tensors, meta, Path(output_dir) / OPTIMIZER_FILE)
            schedule = self.lr_scheduler.state_dict()
            check_plain(schedule, f"lr_scheduler {type(self.lr_scheduler).__name__}")
            (Path(output_dir) / SCHEDULER_FILE).write_text(json.dumps(schedule))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            (Path(output_dir) / SCALER_FILE).write_text(json.dumps(scaler.state_dict()))

    def _save_rng_state(self, output_dir: str) -> None:
        states = gather_object([random_state(cuda=torch.cuda.is_available())])
        if self.args.should_save:
            (Path(output_dir) / RNG_FILE).write_text(json.dumps(states))

    def _save_data_position(self, folder: Path) -> None:
        """Where a streamed data set is behind the rows that were trained on."""
        data: Any = self.train_dataset
        if not self.args.should_save or not hasattr(data, "position_at"):
            return
        if self.args.dataloader_num_workers:
            return  # the workers have streams of their own; a resumed run skips what was trained on
        per_step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        position = data.position_at(self.state.global_step * per_step)
        (folder / DATA_FILE).write_text(json.dumps(position))

    # ---- reading --------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        refuse_pickles(Path(resume_from_checkpoint))
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        inside = self.model if model is None else model
        names = parameter_names(inside)
        missing = set(names.values()) - _copy_weights(Path(resume_from_checkpoint), inside, names)
        trained = {names[p] for p in names if p.requires_grad}
        if missing & trained:
            raise ValueError(
                f"{resume_from_checkpoint} has no weight {sorted(missing & trained)[0]!r}; it is of"
                " another model"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        refuse_pickles(folder)
        if not (folder / OPTIMIZER_FILE).is_file():
            return  # save_only_model: training continues with a fresh optimiser, as transformers does
        load_optimizer_state(self._plain_optimizer(), self._parameter_names(), folder / OPTIMIZER_FILE)
        self.lr_scheduler.load_state_dict(json.loads((folder / SCHEDULER_FILE).read_text()))

    def _load_scaler(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "") / SCALER_FILE
        if checkpoint is not None and path.is_file():
            self.accelerator.scaler.load_state_dict(json.loads(path.read_text()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "") / RNG_FILE
        if checkpoint is not None and path.is_file():
            states = json.loads(path.read_text())
            # The processes draw the same numbers, so one that was not there takes the first's.
            index = self.args.process_index
            set_random_state(states[index if index < len(states) else 0])

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner

    def _parameter_names(self) -> dict[nn.Parameter, str]:
        inside = self.accelerator.unwrap_model(self.model)
        put_shards_back(inside)
        return parameter_names(inside)


def saved_count(state: Any, name: str) -> int:
    """A count of the training so far; of a checkpoint that has none, the last in the log, or 0."""
    counts = state.stateful_callbacks.get(COUNTS, {}).get("attributes", {})
    if name in counts:
        return int(counts[name])
    logged = [entry[name] for entry in state.log_history if name in entry]
    return int(logged[-1]) if logged else 0


class _SaveAgain(TrainerCallback):
    """Asks for the save that failed before."""

    def __init__(self, trainer: SafeCheckpoints):
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        again = self._trainer._save_again_at
        if again is not None and state.global_step >= again:
            control.should_save = True


def _copy_weights(folder: Path, model: nn.Module, names: dict[nn.Parameter, str]) -> set[str]:
    """Copy a checkpoint's weights into sharded parameters; returns the names that were found."""
    # An adapter's file leaves out the adapter's name.
    by_name = {
        name.replace("modules_to_save.default.", "").replace(".default.", "."): parameter
        for parameter, name in names.items()
    }
    buffers = dict(model.named_buffers())
    found = set()
    for path in [*folder.glob("model*.safetensors"), *folder.glob("adapter_model*.safetensors")]:
        with safe_open(path, "pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 - not a mapping
                target = by_name.get(name, buffers.get(name))
                if target is None:
                    continue
                value = like(file.get_tensor(name).to(target.dtype), target)
                if isinstance(target, DTensor) and isinstance(value, DTensor):
                    target.to_local().copy_(value.to_local())
                else:
                    target.copy_(value)
                found.add(names[target] if isinstance(target, nn.Parameter) else name)
    return found


@contextmanager
def _without_embeddings(model: Any) -> Iterator[None]:
    """Within, an adapter is saved without the tables of its decoder; loading makes their new rows again.

    peft would save them whole, and look for the number of tokens in the decoder's own configuration as
    if it were one of a model with thoughts.
    """
    if not hasattr(model, "peft_config"):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    try:
        yield
    finally:
        del model.save_pretrained

"""Choose tasks and run them: items in the journal are not scored again, processes share the rest."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.data.sources import expand_files
from quietstar.errors import UserError
from quietstar.evaluation.journal import Journal
from quietstar.evaluation.tasks import OWN, Record, Task, digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install 'quietstar[eval]'"


# ---- what the words of the command line mean ------------------------------------------------------


def split_names(words: str) -> list[str]:
    """``"gsm8k,csqa"`` as a list, each name once."""
    names = [name.strip() for name in words.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks is {words!r}; expected names, e.g. {','.join(OWN)}")
    return list(dict.fromkeys(names))


def check_foreign(names: Sequence[str], include: Path | None) -> Any:
    """The harness's tasks, read, if one is asked for; each name has to be one of them."""
    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include} is not a folder")
    if not names:
        return None
    own = ", ".join(OWN)
    try:
        from quietstar.evaluation.harness import Tasks
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        raise UserError(
            f"unknown task {names[0]!r}{_nearest(names[0], OWN)}; tasks of this package: {own} (those of"
            f" lm-evaluation-harness need {INSTALL})"
        ) from None
    manager = Tasks(include)
    for name in names:
        if not manager.match_tasks([name]):
            raise UserError(
                f"unknown task {name!r}{_nearest(name, [*OWN, *manager.all_tasks])}; tasks of this"
                f" package: {own}; the others are lm-evaluation-harness's"
            )
    manager.load(list(names))
    return manager


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def assign_files(words: Sequence[str], own: Sequence[str]) -> dict[str, Path]:
    """``--data FILE`` (for the only task) and ``--data TASK=FILE``, as a file per task."""
    files: dict[str, Path] = {}
    for word in words:
        name, mark, path = word.partition("=")
        if not mark or name not in OWN:
            if len(own) != 1:
                raise UserError(
                    f"--data {word} does not name its task, and {len(own)} tasks read files"
                    f" ({', '.join(own) or 'none'}); expected TASK=FILE"
                )
            name, path = own[0], word
        if name not in own:
            raise UserError(f"--data names the task {name}, which is not among --tasks")
        expand_files(path)  # a missing file is found now, not when the model is there
        files[name] = Path(path).expanduser()
    if "gsm8k" in files and "gsm8k-cot" in own:
        files.setdefault("gsm8k-cot", files["gsm8k"])  # the same items
    return files


# ---- the model ----------------------------------------------------------------------------------


def fingerprint(model: PreTrainedModel, samples: int = 256) -> str:
    """A name for a model's weights and configuration, 64 hex digits.

    Of each tensor, its name, type, shape and up to ``samples`` values spread over it: training moves
    them all, and reading every value of a large model would take minutes.
    """
    seen = hashlib.sha256()
    settings = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype"):
        settings.pop(key, None)
    seen.update(repr(sorted(settings.items(), key=lambda pair: pair[0])).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, len(flat) // samples)
        values = flat[::step].cpu().double().numpy().tobytes()
        seen.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + values)
    return seen.hexdigest()


# ---- running ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskRunner:
    """What the tasks of a command have in common.

    Attributes:
        identity: of the model (:func:`fingerprint`); with the task's own it names a record.
        state: accelerate's; says which process this is.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    identity: str
    journal: Journal
    batch_size: int
    state: Any
    progress: bool

    def records(self, task: Task, items: Sequence[dict[str, Any]]) -> list[Record]:
        """Records of all items in their order, from the journal where it has them.

        Each process takes every n-th open item, and all return the records of all.
        """
        from accelerate.utils import gather_object
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

        run = digest([self.identity, task.name, task.identity()])
        keys = [Journal.key(run, item) for item in items]
        records = {key: self.journal.found[key] for key in keys if key in self.journal.found}
        if self.state.num_processes > 1:
            self.state.wait_for_everyone()  # nobody writes before all have read
        # The same item may occur twice; it is scored once.
        open_items = list({k: i for k, i in zip(keys, items, strict=True) if k not in records}.items())
        mine = open_items[self.state.process_index :: self.state.num_processes]
        bar = tqdm(
            total=len(mine),
            desc=task.name,
            unit=" items",
            disable=not (self.progress and self.state.is_main_process),
        )
        done: list[tuple[str, Record]] = []
        with bar:
            for first in range(0, len(mine), self.batch_size):
                batch = mine[first : first + self.batch_size]
                scored = task.score(self.model, self.tokenizer, [item for _, item in batch])
                found = list(zip((key for key, _ in batch), scored, strict=True))
                self.journal.add(found)
                done += found
                bar.update(len(batch))
        if self.state.num_processes > 1:
            done = gather_object(done)
        records.update(done)
        return [records[key] for key in keys]

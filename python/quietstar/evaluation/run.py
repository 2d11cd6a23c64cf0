"""``quietstar eval``: the tasks of a command line, run, resumed, written and shown."""

from __future__ import annotations

import argparse
import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quietstar.checkpoints.load import load_checkpoint
from quietstar.data.sources import expand_files
from quietstar.errors import UserError, check_seed
from quietstar.evaluation.chains import ChainSettings
from quietstar.evaluation.journal import Journal
from quietstar.evaluation.table import render
from quietstar.evaluation.tasks import OWN, Record, Settings, Task, digest
from quietstar.files import check_writable_file, write_json
from quietstar.versions import package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install 'quietstar[eval]'"


def main(args: argparse.Namespace) -> int:
    """Run the command; the arguments are those of ``quietstar eval``."""
    from accelerate import PartialState

    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; expected a whole number >= 1")
    names = split_names(args.tasks)
    own, foreign = [n for n in names if n in OWN], [n for n in names if n not in OWN]
    manager = check_foreign(foreign, args.include_path)
    files = assign_files(args.data or [], own)
    check_seed(args.seed)
    if args.output is not None:
        check_writable_file(args.output)
    state = PartialState(cpu=not torch.cuda.is_available() or args.device == "cpu")
    if foreign and state.num_processes > 1:
        raise UserError(
            f"task {foreign[0]} belongs to the harness, which starts its own processes; use accelerate"
            " launch -m quietstar.evaluation.harness"
        )
    # Several processes: each on the device that accelerate gives it.
    device = args.device if state.num_processes == 1 else str(state.device)
    model, tokenizer = load_checkpoint(args.model, device=device, tokenizer=args.tokenizer)
    tasks = [OWN[name](name, settings_of(args, files.get(name))) for name in own]
    items = [task.items(tokenizer) for task in tasks]
    identity = fingerprint(model)
    output = (
        args.output
        or Path("quietstar-runs/eval") / f"{Path(args.model).resolve().name}-{identity[:8]}.json"
    )
    check_writable_file(output)
    journal = Journal(output, state.process_index)
    results: dict[str, Any] = {}
    for task, rows in zip(tasks, items, strict=True):
        run = digest([identity, task.name, task.identity()])
        records = run_task(
            model, tokenizer, task, rows, run, journal, args.batch_size, state, not args.quiet
        )
        results[task.name] = task.summarize(records)
    if foreign:
        from quietstar.evaluation.harness import run_tasks

        results.update(
            run_tasks(
                model,
                tokenizer,
                foreign,
                manager,
                limit=args.limit,
                batch_size=args.batch_size,
                seed=args.seed,
            )
        )
    if state.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": args.model, "fingerprint": identity, "tasks": results}
        write_json(output, {**content, "versions": package_versions()})
        print(render(results))
        print(f"\nwritten to {output}")
    return 0


# ---- what the words of the command line mean ------------------------------------------------------


def split_names(words: str) -> list[str]:
    """``"gsm8k,csqa"`` as a list, each name once."""
    names = [name.strip() for name in words.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks is {words!r}; expected names, e.g. {','.join(OWN)}")
    return list(dict.fromkeys(names))


def check_foreign(names: Sequence[str], include: Path | None) -> Any:
    """The harness's task manager, if a task needs it; each name has to be one of its tasks."""
    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include} is not a folder")
    if not names:
        return None
    own = ", ".join(OWN)
    try:
        from quietstar.evaluation.harness import known_tasks
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        raise UserError(
            f"unknown task {names[0]!r}{_nearest(names[0], OWN)}; tasks of this package: {own} (those of"
            f" lm-evaluation-harness need {INSTALL})"
        ) from None
    manager = known_tasks(include)
    for name in names:
        if not manager.match_tasks([name]):
            raise UserError(
                f"unknown task {name!r}{_nearest(name, [*OWN, *manager.all_tasks])}; tasks of this"
                f" package: {own}; the others are lm-evaluation-harness's"
            )
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
                    f"--data {word} was given with {len(own)} tasks that read files"
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


def settings_of(args: argparse.Namespace, data: Path | None) -> Settings:
    """The settings of one task."""
    return Settings(
        data=data,
        limit=args.limit,
        max_length=args.max_length,
        block_size=args.block_size,
        chains=ChainSettings(
            votes=args.votes,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            thinking=args.thinking,
            seed=args.seed,
        ),
    )


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


def run_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    items: Sequence[dict[str, Any]],
    run: str,
    journal: Journal,
    batch_size: int,
    state: Any,
    progress: bool,
) -> list[Record]:
    """Records of all items in their order, from the journal where it has them.

    ``state`` (accelerate's) says which process this is: each takes every n-th open item, and all
    processes return the records of all.
    """
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

    keys = [Journal.key(run, item) for item in items]
    records = {key: journal.found[key] for key in keys if key in journal.found}
    if state.num_processes > 1:
        state.wait_for_everyone()  # nobody writes before all have read
    # The same item may occur twice; it is scored once.
    open_items = list({k: i for k, i in zip(keys, items, strict=True) if k not in records}.items())
    mine = open_items[state.process_index :: state.num_processes]
    bar = tqdm(
        total=len(mine), desc=task.name, unit=" items", disable=not (progress and state.is_main_process)
    )
    done: list[tuple[str, Record]] = []
    with bar:
        for first in range(0, len(mine), batch_size):
            batch = mine[first : first + batch_size]
            scored = task.score(model, tokenizer, [item for _, item in batch])
            found = list(zip((key for key, _ in batch), scored, strict=True))
            journal.add(found)
            done += found
            bar.update(len(batch))
    if state.num_processes > 1:
        done = gather_object(done)
    records.update(done)
    return [records[key] for key in keys]

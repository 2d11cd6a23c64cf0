"""Trainings side by side, each in a process with one thread.

A second thread gains such small models little, and loses much where something else runs on the machine:
threads wait for each other. A second training gains nearly a whole core's work.

A process is this module, run by name: it writes a line of JSON for every step to its standard output,
ends when its standard input does, as it does with the process that started it, however that ended, and
leaves what it and its imports say in a file.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from quietstar.errors import UserError
from quietstar.training.process import keep_freed_memory

# work(name, *args, report=...) trains a run, and tells ``report`` of every step that is done. It is a
# function of a module, which another process can import; its arguments are plain data.
Work = Callable[..., None]


class WaitFor(Protocol):
    """Waits until a run is done, if it is one of them, or until something holds, asked at every step."""

    def __call__(self, name: str, until: Callable[[], bool] = ...) -> None: ...


THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def never() -> bool:
    """For who waits until a run is done."""
    return False


@contextmanager
def at_most_threads(count: int) -> Iterator[None]:
    """Let torch and the operators use at most ``count`` threads within the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def side_by_side(
    work: Work, steps: Mapping[str, int], *args: Any, logs: Path, progress: bool = True
) -> Iterator[WaitFor]:
    """Give a function that waits for a run; they start in their order.

    As many run at once as torch would use threads. Where that is one, or on a GPU, which they would
    share, each runs in this process when it is first waited for. Processes end with the block.

    Args:
        work: trains a run of a name.
        steps: the runs' names, and how many steps each will report.
        args: for every call of ``work``; plain data, as in JSON.
        logs: the folder in which each process leaves what it says, as ``NAME.log``.
        progress: whether to show one bar for all.

    Raises:
        UserError: when waiting, for what a run's own UserError says, or if its process ends otherwise.
    """
    import torch

    at_once = min(torch.get_num_threads(), len(steps))
    if at_once < 2 or torch.accelerator.is_available():
        done: set[str] = set()

        def wait_for(name: str, until: Callable[[], bool] = never) -> None:
            if name in steps and name not in done and not until():
                work(name, *args)
                done.add(name)

        yield wait_for
        return
    logs.mkdir(parents=True, exist_ok=True)
    runs = _Runs(work, steps, args, at_once, logs, progress)
    try:
        yield runs.wait_for
    finally:
        runs.end()


class _Runs:
    def __init__(
        self,
        work: Work,
        steps: Mapping[str, int],
        args: tuple[Any, ...],
        at_once: int,
        logs: Path,
        progress: bool,
    ):
        self.command = [f"{work.__module__}:{work.__name__}", json.dumps(args)]
        self.at_once, self.logs, self.steps = at_once, logs, steps
        self.waiting, self.done = list(steps), set[str]()
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.reached = dict.fromkeys(steps, 0)
        # A line of a process, or None when it has closed its output.
        self.heard: queue.Queue[tuple[str, str | None]] = queue.Queue()
        self.bar = tqdm(total=sum(steps.values()), unit="step", disable=not progress, leave=False)
        self._fill()

    def wait_for(self, name: str, until: Callable[[], bool] = never) -> None:
        while name in self.steps and name not in self.done and not until():
            self._hear(*self.heard.get())
            self._fill()
        self.bar.clear()

    def end(self) -> None:
        for process in self.running.values():
            process.kill()  # as a run may be killed at any time
        for process in self.running.values():
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self.bar.close()

    def _fill(self) -> None:
        while self.waiting and len(self.running) < self.at_once:
            self._start(self.waiting.pop(0))

    def _start(self, name: str) -> None:
        with self._log(name).open("ab") as log:
            log.truncate(0)
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, name, *self.command],
                env={**os.environ, **THREADS},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # the keyboard's interruption is for the process that waits
            )
        self.running[name] = process
        threading.Thread(target=self._listen, args=(name, process.stdout), daemon=True).start()

    def _listen(self, name: str, output: Any) -> None:
        with output:
            for line in output:
                self.heard.put((name, line))
        self.heard.put((name, None))

    def _hear(self, name: str, line: str | None) -> None:
        if line is None:
            self._ended(name, self.running.pop(name))
        else:
            message = json.loads(line)
            if isinstance(message, str):
                raise UserError(message)
            self.reached[name] = message
        self.bar.set_description(", ".join(self.running) or name)
        self.bar.update(sum(self.reached.values()) - self.bar.n)

    def _ended(self, name: str, process: subprocess.Popen[str]) -> None:
        status = process.wait()
        assert process.stdin is not None
        process.stdin.close()
        if status == 0:
            self.done.add(name)
            self.reached[name] = self.steps[name]
            return
        log = self._log(name)
        if status < 0:
            raise UserError(
                f"the process that trains {name} was ended by {signal.Signals(-status).name}"
                " (by the system, where memory ran out?); the same command continues where it stopped"
            )
        said = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else ""
        last = (said or "it said nothing").splitlines()[-1]
        raise UserError(f"the process that trains {name} ended with status {status} ({log}): {last}")

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def main(name: str, work: str, args: str) -> int:
    """In the process: train, and tell of every step and of a user's error."""
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print is no message
    threading.Thread(target=_end_with_input, daemon=True).start()
    keep_freed_memory()
    module, _, function = work.partition(":")
    train: Work = getattr(importlib.import_module(module), function)
    try:
        train(name, *json.loads(args), report=lambda step: print(step, file=answer))
    except UserError as error:
        print(json.dumps(str(error)), file=answer)
        return 2
    return 0


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

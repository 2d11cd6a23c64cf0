"""Trainings side by side, each in a process with one thread.

A second thread gains such small models little, and loses much where something else runs on the machine:
threads wait for each other. A second training gains nearly a whole core's work.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from quietstar.errors import UserError

# work(name, *args, report=...) trains a run, and tells ``report`` of every step that is done. It is a
# function of a module, which another process can import.
Work = Callable[..., None]
# Seconds between looks at whether a process still lives.
LOOK = 0.5
# Standard output and errors.
STREAMS = (1, 2)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and the operators use one thread within the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def side_by_side(
    work: Work, steps: Mapping[str, int], *args: Any, logs: Path, progress: bool = True
) -> Iterator[Callable[[str], None]]:
    """Give a function that waits until a run is done; the runs are started in their order.

    As many run at once as torch would use threads. Where that is one, or on a GPU, which they would
    share, each runs in this process when it is waited for. Processes end with the block.

    Args:
        work: trains a run of a name.
        steps: the runs' names, and how many steps each will report.
        args: for every call of ``work``.
        logs: the folder in which each process leaves what it says, as ``NAME.log``.
        progress: whether to show one bar for all.

    Raises:
        UserError: when waiting, for what a run's own UserError says, or if its process ends otherwise.
    """
    import torch

    at_once = min(torch.get_num_threads(), len(steps))
    if at_once == 1 or torch.accelerator.is_available():
        yield lambda name: work(name, *args)
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
        # A fork would take locks of torch's threads along.
        self.context = multiprocessing.get_context("spawn")
        self.messages: Any = self.context.Queue()
        self.work, self.args, self.at_once, self.logs = work, args, at_once, logs
        self.waiting, self.running, self.done = list(steps), {}, set[str]()  # type: ignore[var-annotated]
        self.steps, self.reached = steps, dict.fromkeys(steps, 0)
        self.bar = tqdm(total=sum(steps.values()), unit="step", disable=not progress, leave=False)

    def wait_for(self, name: str) -> None:
        while name not in self.done:
            while self.waiting and len(self.running) < self.at_once:
                self._start(self.waiting.pop(0))
            try:
                self._hear(*self.messages.get(timeout=LOOK))
            except queue.Empty:
                self._look()
        self.bar.clear()

    def end(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.join()
        self.bar.close()

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _start(self, name: str) -> None:
        process = self.context.Process(
            target=_run, args=(self.work, name, self.args, self.messages), daemon=True
        )
        with _inherited(self._log(name)):
            process.start()
        self.running[name] = process

    def _hear(self, name: str, message: int | str | None) -> None:
        if isinstance(message, str):
            raise UserError(message)
        if message is None:
            self.running.pop(name).join()
            self.done.add(name)
        self.reached[name] = self.steps[name] if message is None else message
        self.bar.set_description(", ".join(self.running) or name)
        self.bar.update(sum(self.reached.values()) - self.bar.n)

    def _look(self) -> None:
        for name, process in self.running.items():
            if not process.is_alive() and self.messages.empty():
                log = self._log(name)
                text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
                last = (text.strip() or "no word").splitlines()[-1]
                status = f"ended with status {process.exitcode}"
                raise UserError(f"the process that trains {name} {status} ({log}): {last}")


@contextmanager
def _inherited(log: Path) -> Iterator[None]:
    """What a process that starts within the block finds.

    One thread; a file for all that it and its imports say; and no interruptions from the keyboard, which
    are for the process that waits, and ends the others.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when its torch is imported
    main = threading.current_thread() is threading.main_thread()  # no other may set it
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    ours = [os.dup(stream) for stream in STREAMS]
    try:
        with log.open("wb") as file:
            for stream in STREAMS:
                os.dup2(file.fileno(), stream)
        yield
    finally:
        for stream, own in zip(STREAMS, ours, strict=True):
            os.dup2(own, stream)
            os.close(own)
        if interrupted is not None:
            signal.signal(signal.SIGINT, interrupted)
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


def _run(work: Work, name: str, args: tuple[Any, ...], messages: Any) -> None:
    """In the process: train, and tell how it ends."""
    try:
        work(name, *args, report=lambda step: messages.put((name, step)))
    except UserError as error:
        messages.put((name, str(error)))
        sys.exit(1)
    messages.put((name, None))

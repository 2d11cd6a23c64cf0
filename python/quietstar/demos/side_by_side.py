"""Trainings side by side, each in a process with one thread.

A second thread gains such small models little, and loses much where something else runs on the machine:
threads wait for each other. A second training gains nearly a whole core's work.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from quietstar.errors import UserError

# work(name, *args, report=...) trains a run, and tells ``report`` of every step that is done. It is a
# function of a module, which another process can import.
Work = Callable[..., None]
# Seconds between looks at whether a process still lives.
LOOK = 0.5


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and the operators use one thread within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def side_by_side(
    work: Work, steps: Mapping[str, int], *args: Any, progress: bool = True
) -> Iterator[Callable[[str], None]]:
    """Give a function that waits until a run is done; the runs are started in their order.

    As many run at once as torch would use threads. Where that is one, or on a GPU, which they would
    share, each runs in this process when it is waited for. Processes end with the block.

    Args:
        work: trains a run of a name.
        steps: the runs' names, and how many steps each will report.
        args: for every call of ``work``.
        progress: whether to show one bar for all.

    Raises:
        UserError: when waiting, for what a run's own UserError says, or if its process ends otherwise.
    """
    at_once = min(torch.get_num_threads(), len(steps))
    if at_once == 1 or torch.accelerator.is_available():
        yield lambda name: work(name, *args)
        return
    runs = _Runs(work, steps, args, at_once, progress)
    try:
        yield runs.wait_for
    finally:
        runs.end()


class _Runs:
    def __init__(
        self, work: Work, steps: Mapping[str, int], args: tuple[Any, ...], at_once: int, progress: bool
    ):
        # A fork would take locks of torch's threads along.
        self.context = multiprocessing.get_context("spawn")
        self.messages: Any = self.context.Queue()
        self.work, self.args, self.at_once = work, args, at_once
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

    def _start(self, name: str) -> None:
        process = self.context.Process(
            target=_run, args=(self.work, name, self.args, self.messages), daemon=True
        )
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when its torch is imported
        try:
            process.start()
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
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
                raise UserError(
                    f"the process that trains {name} ended with status {process.exitcode} and left no"
                    " word; expected it to live (is there enough memory?)"
                )


def _run(work: Work, name: str, args: tuple[Any, ...], messages: Any) -> None:
    """In the process: train, and tell how it ends."""
    try:
        with one_thread():
            work(name, *args, report=lambda step: messages.put((name, step)))
    except UserError as error:
        messages.put((name, str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    messages.put((name, None))

"""What the tests of side_by_side let other processes do."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from quietstar.errors import UserError


def work(name: str, place: str, report: Callable[[int], None] | None = None) -> None:
    """Leave who did it, with how many threads, from when to when; or fail as the name says."""
    import torch

    folder, begun = Path(place), time.time()
    for step in (1, 2):
        if report is not None:
            report(step)
    if name == "hangs":
        (folder / name).write_text(str(os.getpid()))
        time.sleep(600)
    if name in ("fails", "lacks", "killed"):
        wait_until(folder / "hangs")
        if name == "fails":
            raise UserError("there is no such corpus")
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        None.rows  # type: ignore[attr-defined]  # noqa: B018
    if name == "first":
        wait_until(folder / "second")  # for as long as the other is not done: they have to run at once
    words = f"{os.getpid()} {torch.get_num_threads()} {begun} {time.time()}"
    (folder / f"{name}.part").write_text(words)
    (folder / f"{name}.part").rename(folder / name)


def wait_until(file: Path) -> None:
    """Wait, for at most two minutes, until a file is there."""
    for _ in range(2400):
        if file.is_file():
            return
        time.sleep(0.05)
    raise TimeoutError(file)

"""What the tests of side_by_side let other processes do."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from quietstar.errors import UserError


def work(name: str, folder: Path, report: Callable[[int], None] | None = None) -> None:
    """Leave who did it, with how many threads and when, or fail as the name says."""
    import torch

    begun = time.time()
    for step in (1, 2):
        if report is not None:
            report(step)
    if name == "fails":
        raise UserError("there is no such corpus")
    if name == "lacks":
        None.rows  # type: ignore[attr-defined]  # noqa: B018
    if name == "hangs":
        (folder / "hangs").write_text(str(os.getpid()))
        time.sleep(600)
    while name == "first" and not (folder / "second").is_file():
        time.sleep(0.01)  # for as long as the other is not done: they have to run at once
    words = f"{os.getpid()} {torch.get_num_threads()} {os.environ.get('OMP_NUM_THREADS')} {begun}"
    (folder / name).write_text(words)

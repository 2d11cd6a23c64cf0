"""Trainings side by side: at once, in their order, and their ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from side_by_side_work import wait_until, work

from quietstar.demos.side_by_side import at_most_threads, side_by_side
from quietstar.errors import UserError

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    paths = [str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def left(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().split()


def steps(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 2)


def test_two_run_at_once_with_a_thread_each(tmp_path, two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    logs, names = tmp_path / "logs", steps("first", "second", "third")
    with side_by_side(work, names, str(tmp_path), logs=logs, progress=False) as wait_for:
        wait_for("second", until=lambda: True)
        assert not (tmp_path / "second").is_file()
        wait_for("second", until=(tmp_path / "second").is_file)
        wait_for("first")  # which ends only when the second has
        assert (tmp_path / "second").is_file()
        for name in ("second", "third", "first", "done before"):
            wait_for(name)
    found = [left(tmp_path, name) for name in names]
    assert len({os.getpid(), *(int(pid) for pid, *_ in found)}) == 4
    assert all(threads == "1" for _, threads, _, _ in found)
    # The third began when one of the first two had ended.
    assert float(found[2][2]) > min(float(found[0][3]), float(found[1][3]))


def test_alone_each_runs_here_and_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    with side_by_side(lambda *call: calls.append(call), steps("a", "b"), 7, logs=tmp_path) as wait_for:
        for name in ("b", "b", "done before", "a", "b"):
            wait_for(name)
    assert calls == [("b", 7), ("a", 7)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "there is no such corpus"),
        ("lacks", r"ended with status 1 \(.*lacks.log\): AttributeError: .* 'rows'"),
        ("killed", "the process that trains killed was ended by SIGKILL"),
    ],
)
def test_a_failure_is_a_sentence_and_ends_the_others(name: str, said: str, tmp_path, two_threads):
    runs = side_by_side(work, steps("hangs", name), str(tmp_path), logs=tmp_path, progress=False)
    with pytest.raises(UserError, match=said), runs as wait_for:
        wait_for("hangs")
    assert not lives(int(left(tmp_path, "hangs")[0]))


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interruption_ends_them(tmp_path, two_threads):
    runs = side_by_side(work, steps("hangs", "second"), str(tmp_path), logs=tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt), runs as wait_for:
        wait_for("second")
        wait_until(tmp_path / "hangs")
        raise KeyboardInterrupt
    assert not lives(int(left(tmp_path, "hangs")[0]))


PARENT = """
import sys, torch
from pathlib import Path
from quietstar.demos.side_by_side import side_by_side
from side_by_side_work import work
torch.set_num_threads(2)
with side_by_side(work, {"hangs": 2, "second": 2}, sys.argv[1], logs=Path(sys.argv[1])) as wait_for:
    wait_for("hangs")
"""


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on a GPU they run one after another")
def test_they_end_with_a_parent_that_is_killed(tmp_path, two_threads):
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT, str(tmp_path)])
    wait_until(tmp_path / "hangs")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    ended(lambda: lives(int(left(tmp_path, "hangs")[0])))


def ended(goes_on: Callable[[], bool]) -> None:
    for _ in range(200):
        if not goes_on():
            return
        time.sleep(0.1)
    raise AssertionError("a process goes on")


def test_so_many_threads_within_the_block():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), at_most_threads(1):
            assert torch.get_num_threads() == 1
            raise KeyError
        with at_most_threads(3):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

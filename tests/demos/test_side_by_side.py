"""Trainings side by side: at once, in their order, and their ends."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from side_by_side_work import work

from quietstar.demos.side_by_side import one_thread, side_by_side
from quietstar.errors import UserError


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


def left(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().split()


def steps(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 2)


def test_two_run_at_once_with_a_thread_each(tmp_path, two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with side_by_side(
        work, steps("first", "second", "third"), tmp_path, logs=tmp_path / "logs", progress=False
    ) as wait_for:
        wait_for("first")  # which ends only when the second has
        assert (tmp_path / "second").is_file()
        wait_for("second")
        wait_for("third")
    found = [left(tmp_path, name) for name in ("first", "second", "third")]
    assert len({pid for pid, *_ in found}) == 3 and str(os.getpid()) not in {pid for pid, *_ in found}
    assert all(threads == given == "1" for _, threads, given, _ in found)
    # The third began when one of the first two was done, and the own setting is as it was.
    assert float(found[2][3]) > max(float(found[0][3]), float(found[1][3]))
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_alone_they_run_here_when_they_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    with side_by_side(work, steps("second", "third"), tmp_path, logs=tmp_path) as wait_for:
        wait_for("third")
        assert left(tmp_path, "third")[0] == str(os.getpid()) and not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "there is no such corpus"),
        ("lacks", r"ended with status 1 \(.*lacks.log\): AttributeError: .* 'rows'"),
    ],
)
def test_a_failure_is_a_sentence_and_ends_the_others(name: str, said: str, tmp_path, two_threads):
    runs = side_by_side(work, steps("hangs", name), tmp_path, logs=tmp_path / "logs", progress=False)
    with pytest.raises(UserError, match=said), runs as wait_for:
        wait_for("hangs")
    for _ in range(100):
        if not (tmp_path / "hangs").is_file() or not lives(int(left(tmp_path, "hangs")[0])):
            return
        time.sleep(0.1)
    raise AssertionError("a process goes on")


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interruption_ends_them(tmp_path, two_threads):
    runs = side_by_side(work, steps("hangs", "second"), tmp_path, logs=tmp_path / "logs", progress=False)
    with pytest.raises(KeyboardInterrupt), runs as wait_for:
        wait_for("second")
        while not (tmp_path / "hangs").is_file():
            time.sleep(0.01)
        # As from the keyboard, which tells all of them.
        os.kill(int(left(tmp_path, "hangs")[0]), signal.SIGINT)
        time.sleep(0.3)
        assert lives(int(left(tmp_path, "hangs")[0]))
        raise KeyboardInterrupt
    assert not lives(int(left(tmp_path, "hangs")[0]))


def test_one_thread_within_the_block():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

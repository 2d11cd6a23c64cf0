"""SIGKILL at any time: the next run ends where an undisturbed one does, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "killed_runs.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    log = folder / "log.txt"
    assert done.returncode == 0, done.stderr[-3000:] + (log.read_text()[-3000:] if log.is_file() else "")
    found: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.slow
def test_every_run_ends_in_the_same_weights(results: dict[str, dict[str, Any]]):
    """Weights, optimiser, schedule, random numbers, what was logged, what was evaluated."""
    for name, result in results.items():
        assert result["ends"][-1] == 0 and not result["different"], (name, result)


@pytest.mark.slow
def test_the_runs_were_killed_where_they_should_be(results: dict[str, dict[str, Any]]):
    named = {name: result for name, result in results.items() if not name.startswith("random")}
    assert len(named) > 10
    for name, result in named.items():
        assert result["ends"][0] == -9, (name, result)
    seen = {name: result["seen"] for name, result in named.items()}
    assert seen["in the second optimiser file"] == ["checkpoint-3", "incomplete-checkpoint-6"]
    assert seen["when the second has its name"] == ["checkpoint-3", "checkpoint-6"]
    assert seen["when an old checkpoint is being deleted"] == ["checkpoint-6", "incomplete-checkpoint-3"]

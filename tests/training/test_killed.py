"""SIGKILL at any time: the next run ends where an undisturbed one does, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_recipes import run_python

SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    run_python(SUPPORT / "killed_runs.py", folder, cwd=folder)
    found: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


def test_every_run_ends_in_the_same_weights(results: dict[str, dict[str, Any]]):
    """Weights, optimiser, schedule, random numbers, what was logged, what was evaluated."""
    for name, result in results.items():
        assert result["ends"][-1] == 0 and not result["different"], (name, result)


def test_the_runs_were_killed_where_they_should_be(results: dict[str, dict[str, Any]]):
    named = {name: result for name, result in results.items() if not name.startswith("random")}
    assert len(named) > 10
    for name, result in named.items():
        assert result["ends"][0] == -9, (name, result)
    seen = {name: result["seen"] for name, result in named.items()}
    assert seen["in the second optimiser file"] == ["checkpoint-3", "incomplete-checkpoint-6"]
    assert seen["when the second has its name"] == ["checkpoint-3", "checkpoint-6"]
    assert seen["when an old checkpoint is being deleted"] == ["checkpoint-6", "incomplete-checkpoint-3"]

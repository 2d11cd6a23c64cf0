"""A long run leaves nothing behind; ``python -m benchmarks.soak`` is the same over 2,000 steps."""

import json
from pathlib import Path

import pytest
from small_recipes import run_python

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    # By its path: the repository's root on sys.path would hide the installed package.
    done = run_python(SCRIPT, "300", cwd=tmp_path)
    found = json.loads(done.stdout[done.stdout.rindex("{\n") :])
    # The log itself grows by some kilobytes an entry; one step's graph would be over a megabyte.
    assert found["bytes per step"] < 30_000, found
    assert abs(found["tensors per step"]) < 0.05, found

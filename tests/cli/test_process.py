"""What the commands decide about threads and memory of their process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from quietstar.training.process import keep_freed_memory, let_threads_sleep

# Writes 48 MiB and frees them, several times over, as a step does; prints how many pages were new.
STEPS = """
import resource, sys
from quietstar.training.process import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "kept" else None
def step():
    pieces = [bytearray(b"x") * (4 << 20) for _ in range(12)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def steps(how: str, **environment: str) -> tuple[str, int]:
    found = subprocess.run(
        [sys.executable, "-P", "-c", STEPS, how],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    done, faults = found.stdout.split()
    return done, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has such settings")
def test_freed_memory_serves_the_next_step(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)
    _, returned = steps("given back")
    done, kept = steps("kept")
    assert done == "True"
    assert returned > 10_000 and kept < returned / 10, (returned, kept)
    # The user's own setting stays: a threshold of 0 gives everything back.
    done, own = steps("kept", MALLOC_TRIM_THRESHOLD_="0")
    assert done == "False" and own > 10_000


def test_the_users_own_memory_settings_are_left_alone(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert not keep_freed_memory()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_sleep_soon_unless_the_environment_says_how_they_wait(monkeypatch, given, wanted):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    let_threads_sleep()
    assert os.environ.get("GOMP_SPINCOUNT") == wanted

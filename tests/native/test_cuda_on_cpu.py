"""Running CUDA sources on the CPU: what it must find, it finds; and the kernels pass its sanitizers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import ModuleType

import cuda_sources
import pytest

# Orders of threads and seeds. An uneven one shows a mistake for some seeds only.
ORDERS = (("forward", 7), ("reverse", 7), ("shuffled", 7), *(("uneven", seed) for seed in range(12)))
FAULTS = (
    *("deleted_barrier", "deleted_second_barrier", "divergent_barrier", "early_read"),
    *("late_copy", "missing_lanes", "order_of_arrival", "store_past_global"),
    *("store_past_shared", "two_barriers", "wrong_mask"),
)
# What the error says; the others give other results in some order of the threads.
MESSAGES = {
    "divergent_barrier": "wait for each other for ever: 32 at the barrier in faults.cu",
    "missing_lanes": "left the kernel",
    "store_past_shared": "stored outside of dynamic shared memory",
    "two_barriers": "divergent barrier: thread 0 is at faults.cu",
    "wrong_mask": "reads from lane 16, which is not in the mask",
}

pytestmark = pytest.mark.cuda_on_cpu


def results(module: ModuleType, name: str, sound: bool) -> list[list[float]]:
    found = []
    for order in ORDERS:
        module.set_order(*order)
        found.append(module.run_fault(name, sound))
    return found


def test_every_fault_is_listed(cuda_on_cpu: ModuleType) -> None:
    assert sorted(cuda_on_cpu.fault_names()) == sorted(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_sound_kernel_passes_in_every_order(cuda_on_cpu: ModuleType, name: str) -> None:
    first, *others = results(cuda_on_cpu, name, True)
    assert not any(math.isnan(x) for x in first)
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", [n for n in FAULTS if n not in ("store_past_global", *MESSAGES)])
def test_a_race_shows_in_some_order(cuda_on_cpu: ModuleType, name: str) -> None:
    (right, *_) = results(cuda_on_cpu, name, True)
    assert any(found != right for found in results(cuda_on_cpu, name, False))


def test_a_late_copy_shows_only_where_a_warp_is_far_ahead(cuda_on_cpu: ModuleType) -> None:
    first, *others = results(cuda_on_cpu, "late_copy", False)
    assert all(found == first for found in others[:2])
    assert any(found != first for found in others[2:])


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("order", ORDERS[:4], ids=str)
def test_a_fault_is_reported(cuda_on_cpu: ModuleType, name: str, order: tuple[str, int]) -> None:
    if cuda_on_cpu.sanitized and name == "store_past_shared":
        pytest.skip("the address sanitizer ends the process")
    cuda_on_cpu.set_order(*order)
    with pytest.raises(RuntimeError, match=f"kernel {name}.*{MESSAGES[name]}"):
        cuda_on_cpu.run_fault(name, False)
    assert not any(math.isnan(x) for x in cuda_on_cpu.run_fault(name, True))


def test_a_launch_can_be_made_to_fail(cuda_on_cpu: ModuleType) -> None:
    cuda_on_cpu.fail_launch(1)
    cuda_on_cpu.run_fault("wrong_mask", True)
    with pytest.raises(RuntimeError, match="kernel wrong_mask: injected launch failure"):
        cuda_on_cpu.run_fault("wrong_mask", True)
    cuda_on_cpu.run_fault("wrong_mask", True)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", "import cuda_sources; module = cuda_sources.load(); " + code],
        env={**cuda_sources.sanitized_environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(cuda_sources.SANITIZED, reason="starts the sanitized processes")
@pytest.mark.parametrize("name", ["store_past_global", "store_past_shared"])
def test_the_address_sanitizer_names_the_line(name: str) -> None:
    done = python(f"module.run_fault('{name}', False)")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and f"faults.cu:{line_of(name)} " in done.stderr, (
        done.stderr[-4000:]
    )


def line_of(name: str) -> int:
    """The line of the store in a kernel of faults.cu."""
    source = (cuda_sources.REPOSITORY / "csrc/testing/faults.cu").read_text().splitlines()
    start = next(i for i, line in enumerate(source) if line.startswith(f"__global__ void {name}("))
    return next(i for i in range(start, len(source)) if "(sound ? 0 : 1)] = 1;" in source[i]) + 1


def pytest_command(*options: str) -> list[str]:
    # -P: the source folder must not hide the installed package.
    return [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]


def collected(marks: str) -> list[str]:
    """The tests of the whole tree that have the marks."""
    done = subprocess.run(
        pytest_command("--collect-only", "-m", marks, "tests"),
        cwd=cuda_sources.REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith("tests/")]


@pytest.mark.skipif(cuda_sources.SANITIZED, reason="some tests alone are collected there")
def test_tests_are_found_by_their_mark() -> None:
    """Also those that have it from a fixture, as scripts/gpu_check.sh needs them."""
    operators = ("linear_cross_entropy", "mixing_head", "sample_tokens", "thought_attention")
    found = {test.partition("::")[0].rpartition("/")[2] for test in collected("gpu")}
    assert {f"test_{name}_cuda.py" for name in operators} <= found


@pytest.mark.slow
@pytest.mark.skipif(cuda_sources.SANITIZED, reason="starts the sanitized processes")
def test_every_kernel_passes_the_sanitizers() -> None:
    """The tests of the kernels again, with both sanitizers watching every access."""
    selected = "cuda_on_cpu and not slow"
    # Collected by the mark in an ordinary process; under the sanitizers these files alone are imported.
    files = {test.partition("::")[0] for test in collected(selected)}
    assert len(files) > 5
    done = subprocess.run(
        # What a sanitizer prints on its way out must not go down with pytest's capture.
        [*pytest_command("-x", "--capture=sys", "-m", selected), *sorted(files)],
        cwd=cuda_sources.REPOSITORY,
        env=cuda_sources.sanitized_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert " passed" in done.stdout

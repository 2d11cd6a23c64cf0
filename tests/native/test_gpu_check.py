"""scripts/gpu_check.sh without a GPU: stages, limits and table, where other programs are played."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"
FIRST = ("device", "build", "test", "memcheck", "racecheck")

# Plays Python, pytest and pip; short scripts from standard input run in earnest.
PYTHON = """#!{python}
import json, os, sys, time
from pathlib import Path

said = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    print(*said[:40], file=calls)
line = " ".join(said)
if said[0] == "-" or "sysconfig" in line:
    os.execv(sys.executable, [sys.executable, *said])
if "--collect-only" in said:
    if "gpu" in said:
        print("".join(f"tests/test_a.py::test_{{n}}\\n" for n in range(20)))
    else:
        files = sorted(Path("benchmarks").glob("bench_*.py"))
        print("".join(f"benchmarks/{{path.name}}::bench\\n" for path in files))
elif report := [word[11:] for word in said if word.startswith("--junitxml=")]:
    ran = int(os.environ.get("RAN", 20))
    cases = "".join(f'<testcase classname="a" name="{{n}}"/>' for n in range(ran))
    Path(report[0]).write_text(f"<testsuites>{{cases}}</testsuites>")
    print(f"{{ran}} passed")
elif "benchmarks/bench_" in line:
    name = line.rpartition("bench_")[2].removesuffix(".py")
    Path("benchmarks/results/gpu.json").write_text(json.dumps({{"measured": name}}))
    if name == os.environ.get("HANGS"):
        time.sleep(100)
    print("1 passed")
elif "build_info" in line:
    print({{"cuda_archs": "sm_90"}})
elif "small_calls" in line:
    print("138 calls, 0 failed")
"""
SANITIZER = """#!/bin/bash
echo "sanitizer $*" >> "$CALLS"
while [[ $1 != *python* ]]; do shift; done
"$@" || exit
echo "========= ERROR SUMMARY: ${ERRORS:-0} errors"
[[ ${ERRORS:-0} == 0 ]] || echo "=========     at void quietstar::cuda::scan_rows(int)+0x10"
"""
SMI = """#!/bin/bash
case $* in
  *compute_cap*name* | *name*compute_cap*) echo "A GPU, 580.1, 141 GB, 9.0" ;;
  *compute_cap*) echo 9.0 ;;
  *) echo "A GPU" ;;
esac
"""


class Machine:
    """A folder with the script, and a PATH that has a GPU's tools."""

    def __init__(self, folder: Path) -> None:
        self.root, tools = folder / "project", folder / "bin"
        for part in ("scripts", "benchmarks/results", "tests"):
            (self.root / part).mkdir(parents=True)
        shutil.copy(SCRIPT, self.root / "scripts")
        for name in [*re.findall(r"(\w+):\d+", limits_of(SCRIPT.read_text())), "other"]:
            (self.root / "benchmarks" / f"bench_{name}.py").touch()
        tools.mkdir()
        programs = {"python": PYTHON.format(python=sys.executable), "compute-sanitizer": SANITIZER}
        programs |= {"nvidia-smi": SMI, "nvcc": "#!/bin/bash\necho release 13.0\n"}
        for name, text in programs.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.calls, self.out = folder / "calls", folder / "out"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("QUIETSTAR_", "PYTHON"))},
            **{
                "PATH": f"{tools}:/usr/bin:/bin",
                "PYTHON": str(tools / "python"),
                "CUDA_HOME": str(folder),
            },
            **{"CALLS": str(self.calls), "OUT": str(self.out)},
        }

    def run(self, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls.unlink(missing_ok=True)
        return subprocess.run(
            ["bash", str(self.root / "scripts" / "gpu_check.sh"), *stages],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )

    def stages(self) -> dict[str, str]:
        """What the table says of each stage."""
        lines = (self.out / "stages.txt").read_text().splitlines()
        return {line[:32].strip(): " ".join(line[32:].split()) for line in lines}


def limits_of(script: str) -> str:
    """The benchmarks with their limits."""
    (found,) = re.findall(r"limits=\(([^)]*)\)", script)
    return found


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_first_call(machine: Machine) -> None:
    wheel = "/somewhere/quietstar-1-cp312.whl"
    done = machine.run(*FIRST, WHEEL=wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    said = machine.stages()
    assert list(said) == ["device", "build", "test -m gpu", "sanitizer memcheck", "sanitizer racecheck"]
    assert all(text.startswith("ok") for text in said.values())
    assert said["build"].endswith("sm_90, quietstar-1-cp312.whl")
    assert said["test -m gpu"].endswith("20 of 20 ran")
    calls = machine.calls.read_text().splitlines()
    assert f"-m pip install --no-deps --no-index --force-reinstall {wheel}" in calls
    (tests,) = [call for call in calls if "--junitxml" in call]
    assert "-m gpu" in tests and "-n 8" in tests
    memcheck, racecheck = (call for call in calls if call.startswith("sanitizer"))
    # Its kernels end racecheck, not memcheck.
    assert "--without-libraries" in racecheck and "kns=quietstar" in racecheck
    assert "--tool memcheck" in memcheck and "--without-libraries" not in memcheck


def test_tests_that_did_not_run_and_errors_in_our_kernels_are_failures(machine: Machine) -> None:
    done = machine.run("test", "memcheck", RAN="15", ERRORS="3")
    assert done.returncode == 1
    said = machine.stages()
    assert said["test -m gpu"].startswith("failed") and said["test -m gpu"].endswith("15 of 20 ran")
    assert said["sanitizer memcheck"].startswith("failed")
    assert said["sanitizer memcheck"].endswith("3 errors, 1 lines name our kernels")


def test_benchmarks_begin_with_what_was_not_measured(machine: Machine) -> None:
    assert machine.run("build", "bench", WHEEL="a.whl").returncode == 0
    said = machine.stages()
    assert list(said)[:4] == ["build", "bench gpu_generation", "bench gpu_step", "bench attention_paths"]
    assert list(said)[-1] == "bench other"  # found by its mark
    results = json.loads((machine.root / "benchmarks" / "results" / "gpu.json").read_text())
    assert results["measured"] == "other" and len(results["checks"]["stages"]) == len(said)
    assert json.loads((machine.out / "gpu.json").read_text()) == results


def test_a_call_that_is_cut_off_keeps_what_it_has(machine: Machine) -> None:
    done = machine.run("bench", HANGS="attention_paths", TIME_LIMIT="25")
    assert done.returncode == 1
    said = machine.stages()
    assert said["bench gpu_step"].startswith("ok")
    assert said["bench attention_paths"].startswith("time out")
    assert said["bench mixing_head"].startswith("no time")
    results = json.loads((machine.root / "benchmarks" / "results" / "gpu.json").read_text())
    assert results["measured"] == "attention_paths" and results["checks"]["stages"]


def test_another_stage(machine: Machine) -> None:
    done = machine.run("tests")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "there is no stage tests; expected some of: device build test memcheck"
    )


def test_what_it_says_of_itself() -> None:
    script = SCRIPT.read_text()
    names = re.findall(r"(\w+):\d+", limits_of(script))
    assert len(names) > 5
    assert all((REPOSITORY / "benchmarks" / f"bench_{name}.py").is_file() for name in names)
    # Two calls in less than twelve minutes.
    halves = [int(limit) for limit in re.findall(r"(?:then|else) limit=(\d+)", script)[1:]]
    assert len(halves) == 2 and sum(halves) < 720

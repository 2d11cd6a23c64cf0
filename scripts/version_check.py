#!/usr/bin/env python3
"""Runs the whole test suite with the oldest and with the newest dependencies that pyproject.toml admits.

    python scripts/version_check.py [--only oldest] [--folder build/versions] [PYTEST OPTION ...]

For each of the two it makes a fresh virtual environment and installs the package with its test extra,
as ``pip install .`` does for a user: "oldest" with torch and transformers at the lower bounds, "newest"
with what the package index offers below the upper ones (no constraints.txt). Then it runs pytest there.
An environment that is there already, of the same Python, is brought up to date instead of made anew.

Needs the package index, some 15 GB of disk and an hour on two cores. Exit status 1: a suite failed. The
upper bounds in pyproject.toml are moved only after it has passed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BOUNDED = ("torch", "transformers")
WHICH = ("oldest", "newest")


def lowest(requirements: list[str]) -> list[str]:
    """``name==bound.*`` for the packages whose lower bound is a promise."""
    found = []
    for name in BOUNDED:
        (requirement,) = (r for r in requirements if re.match(rf"{name}\b", r))
        (bound,) = re.findall(r">=\s*([\d.]+)", requirement)
        found.append(f"{name}=={bound}.*")
    return found


def run(python: Path, *words: str) -> int:
    """Run a command of an environment, showing it."""
    command = [str(python), *words]
    print("+", *command, flush=True)
    return subprocess.run(command, cwd=REPOSITORY, env=clean_environment()).returncode


def clean_environment() -> dict[str, str]:
    """Without what would put other packages, or other bounds, before the environment's own."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}


def check(which: str, folder: Path, requirements: list[str], options: list[str]) -> bool:
    """Whether the suite passes with the oldest or the newest dependencies."""
    environment = folder / f"{which}-{sys.version_info.major}.{sys.version_info.minor}"
    if not (environment / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    pins = lowest(requirements) if which == "oldest" else []
    upgrade = [] if pins else ["--upgrade"]
    if run(python, "-m", "pip", "install", "-q", *upgrade, ".[test]", *pins):
        return False
    run(python, "-m", "pip", "freeze")
    # -P: the source folder must not hide the installed package.
    return run(python, "-P", "-m", "pytest", "--slow", *options) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=WHICH)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "versions")
    args, options = parser.parse_known_args()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = WHICH if args.only is None else (args.only,)
    folder = args.folder.resolve()
    passed = {which: check(which, folder, project["dependencies"], options) for which in wanted}
    for which, fine in passed.items():
        print(f"{which}: {'passed' if fine else 'failed'}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

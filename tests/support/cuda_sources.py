"""Builds csrc/cuda for the CPU, and the environment in which its sanitized build can be loaded."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]
# Set in a process that was started by `sanitized_environment`.
SANITIZED = os.environ.get("QUIETSTAR_TEST_SANITIZED") == "1"


def tool(name: str) -> str:
    """A program of this Python environment, or one on the PATH."""
    own = Path(sysconfig.get_path("scripts")) / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} was not found; pip install '.[test]' brings it")
    return found


def build(sanitize: bool = SANITIZED) -> Path:
    """Configure and build the CMake target cuda_on_cpu; only what changed is compiled again."""
    name = f"cuda_on_cpu-{sys.implementation.cache_tag}" + ("-sanitized" if sanitize else "")
    folder = REPOSITORY / "build" / name
    configure = [
        *(tool("cmake"), "-G", "Ninja", "-S", str(REPOSITORY), "-B", str(folder)),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DQUIETSTAR_CUDA=off",
        f"-DQUIETSTAR_SANITIZE={'ON' if sanitize else 'OFF'}",
    ]
    # The compiler's own processes must not run under a preloaded sanitizer.
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    compile_it = [tool("cmake"), "--build", str(folder), "--target", "cuda_on_cpu"]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # of several test processes one builds
        for command in (configure, compile_it):
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    (module,) = folder.glob("_cuda_on_cpu*.so")
    return module


@functools.cache
def load() -> ModuleType:
    """The module _cuda_on_cpu, built anew where its sources changed."""
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.sanitized == SANITIZED
    return module


def sanitized_environment() -> dict[str, str]:
    """The environment of a Python process that can load the sanitized module: the sanitizer has to be
    there before anything else."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(found).is_absolute():
            raise RuntimeError(f"g++ has no {name}")
        libraries.append(found)
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch keep memory until the end; leaks are not what is looked for.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "QUIETSTAR_TEST_SANITIZED": "1",
        "OMP_NUM_THREADS": "1",
    }

"""Modules of the repository's benchmarks, whose root on sys.path would hide the installed package."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# PYTHONPATH of a process that runs them: the root comes last.
PATH = os.pathsep.join([*sys.path, str(FOLDER.parent)])


def benchmark(name: str) -> ModuleType:
    """``benchmarks.<name>``, its package taken from the repository's folder by path."""
    if "benchmarks" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        assert spec is not None and spec.loader is not None
        # There before its own code runs, which imports its modules by the package's name.
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    return importlib.import_module(f"benchmarks.{name}")

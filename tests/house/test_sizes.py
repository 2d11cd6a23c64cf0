"""What one can read: files of at most 400 lines, functions of at most eight parameters."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES, MAX_PARAMETERS = 400, 8
FOLDERS = ("python", "quietstar_ext", "csrc", "scripts", "benchmarks", "tests", "docs")
SOURCES = {".py", ".h", ".cpp", ".cu", ".cuh", ".cmake", ".in", ".sh", ".yaml", ".md"}
# Public operators and a public constructor, and what transformers prescribes.
EXEMPT = {
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "linear_sample",
    "mixing_head",
    "sample_tokens",
    "thought_attention",
    "QuietStarForCausalLM.forward",
}


def files(folder: str) -> list[Path]:
    """The sources of a folder: what git knows, or in a copy without git all that was not made."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    found = [ROOT / name for name in done.stdout.splitlines()] or list((ROOT / folder).rglob("*"))
    return [path for path in found if path.suffix in SOURCES and path.is_file()]


def test_the_files_of_folders_are_found():
    assert ROOT / "scripts" / "compile_check.py" in files("scripts") and Path(__file__) in files("tests")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_longer(folder: str):
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(folder)}
    assert lines and not [f"{path}: {count}" for path, count in lines.items() if count > MAX_LINES]


def too_wide(node: ast.AST, inside: str = "") -> list[str]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            found += too_wide(child, f"{child.name}.")
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = child.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            if len(names) - (names[:1] in (["self"], ["cls"])) > MAX_PARAMETERS:
                found.append(inside + child.name)
        found += too_wide(child, inside)
    return found


def test_no_function_has_more_parameters():
    found = set()
    for folder in (ROOT / "python" / "quietstar", ROOT / "quietstar_ext"):
        for path in folder.rglob("*.py"):
            found |= set(too_wide(ast.parse(path.read_text())))
    assert found == EXEMPT

"""A recipe that trains within seconds, and ``quietstar`` as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quietstar.cli import app as cli

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
SIZES = {name: value for name, value in TINY_LLAMA.items() if name != "model_type"}
CONTENT: dict[str, Any] = {
    "name": "small",
    "model": {"config": TINY_LLAMA, "tokenizer": "lookup"},
    "data": {"name": "lookup", "block_size": 16, "max_train_blocks": 20},
    "thoughts": {"thought_length": 2},
    "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "use_cpu": True},
}


def content(**sections: dict[str, Any]) -> dict[str, Any]:
    """The recipe, on the look-up language, with changed sections."""
    return CONTENT | {name: {**CONTENT.get(name, {}), **values} for name, values in sections.items()}


def from_files(*files: Path, **data: Any) -> dict[str, Any]:
    """The section ``data`` for text in files."""
    return {"name": None, "files": [str(file) for file in files], **data}


def rejected(
    capsys: pytest.CaptureFixture[str], words: list[Any], message: str, *, alone: bool = True
) -> None:
    """The command ends with status 2 and a sentence, which is all that it says if ``alone``."""
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    error = capsys.readouterr().err
    assert status == cli.USER_ERROR == 2 and "Traceback" not in error, error
    *before, last = error.splitlines()
    assert last.startswith("quietstar: error: ") and message in last, error
    assert not (alone and before), error


def run_python(*words: Any, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """A process of Python's that ends well; it has one thread.

    ``-P`` for code and modules: in the repository's root the sources would hide the installed package.
    A script keeps its folder, where those are that it imports.
    """
    safe = ["-P"] if words[0] in ("-c", "-m") else []
    done = subprocess.run(
        [sys.executable, *safe, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def run_cli(*words: Any) -> None:
    """``quietstar`` with these words, in this process; it ends well."""
    assert cli.main([str(word) for word in words]) == 0, words

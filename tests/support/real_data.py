"""Data that others made, in the folder that ``QUIETSTAR_DATA`` names or ``../shared/data``."""

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[3] / "shared" / "data"


def real_data(name: str) -> Path:
    """A file or folder of these data; the test is skipped where it is not there."""
    path = Path(os.environ.get("QUIETSTAR_DATA", BESIDE)) / name
    if not path.exists():
        pytest.skip(f"{path} is not there; QUIETSTAR_DATA names the folder of the data")
    return path

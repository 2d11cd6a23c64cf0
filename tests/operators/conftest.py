"""Fixtures of the operators' tests."""

from __future__ import annotations

import pytest
from places import PLACES, place_fixture

place = place_fixture(PLACES)


@pytest.fixture
def device(kernel_device: str) -> str:
    """Where the CUDA kernels run: "cpu", compiled for it, or "cuda"."""
    return kernel_device

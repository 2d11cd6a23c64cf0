"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import quietstar_ext

SIMD_LEVELS = ("generic", "avx2", "avx512")


@pytest.fixture(params=SIMD_LEVELS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per instruction set, and skip those that this machine does not have."""
    level: str = request.param
    if level not in quietstar_ext.build_info()["simd_supported"]:
        pytest.skip(f"this machine has no {level}")
    with quietstar_ext.use_simd(level):
        assert quietstar_ext.build_info()["simd"] == level
        yield level


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of torch's threads back as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

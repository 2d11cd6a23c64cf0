"""A model and a batch of prompts for the tests of generation."""

import generation_cases
import pytest
from torch import Tensor

from quietstar import QuietStarForCausalLM


@pytest.fixture
def model() -> QuietStarForCausalLM:
    return generation_cases.build()


@pytest.fixture
def ids() -> Tensor:
    """[3, 12]; the first row has 3 pads at its left."""
    return generation_cases.prompt()[0]


@pytest.fixture
def mask() -> Tensor:
    return generation_cases.prompt()[1]

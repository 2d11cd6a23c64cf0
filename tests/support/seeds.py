"""What tests draw: the same values in every run, or fresh ones with ``QUIETSTAR_FRESH_SEEDS=1``.

Each test starts from a seed of its own, made of its name, so it draws the same alone as among others.
"""

import os
import random
import zlib

import numpy as np
import torch

FRESH = os.environ.get("QUIETSTAR_FRESH_SEEDS", "") not in ("", "0")
_source = random.Random(0)


def begin(name: str) -> None:
    """Seed everything for the test of this name, in whatever folder its file stands."""
    name = (
        "tests/" + name.rpartition(".py::")[0].rpartition("/")[2] + ".py::" + name.partition(".py::")[2]
    )
    _source.seed(None if FRESH else zlib.crc32(name.encode()))
    reseed()


def reseed() -> int:
    """Seed torch, numpy and random anew, after something has set them, and say with what."""
    seed = _source.getrandbits(32)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    print(f"seed {seed}")
    return seed

"""Where an operator's tests run: its reference, its CPU kernel, its CUDA kernels on a CPU or a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from quietstar_ext import build_info, use_simd

SIMD_LEVELS = ("generic", "avx2", "avx512")


@dataclass
class Place:
    """A device, an implementation, and how close to exact arithmetic it is there.

    Attributes:
        dtype: what tests of exact results use, and ``tolerance`` what they allow.
        simd: the instruction set of the CPU's kernels; None for the best one.
        patches: (object, attribute, value) set for the time of the test.
        must_launch: CUDA kernels must have run on the CPU by the end of the test, which may unset it.
    """

    name: str
    impl: str = "fused"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    tolerance: float = 2e-5
    simd: str | None = None
    patches: tuple[tuple[Any, str, Any], ...] = ()
    must_launch: bool = True

    @property
    def close(self) -> dict[str, float]:
        return {"rtol": self.tolerance, "atol": self.tolerance}

    @property
    def runs_cuda(self) -> bool:
        """The CUDA kernels run, on whichever device."""
        return self.name.startswith("cuda")


REFERENCE = Place("reference", "reference", dtype=torch.float64, tolerance=1e-12)
CPU = Place("cpu")
CUDA_ON_CPU = Place("cuda_on_cpu")
CUDA = Place("cuda", device="cuda")
PLACES = (REFERENCE, CPU, CUDA_ON_CPU, CUDA)
EVERY_SIMD = tuple(replace(CPU, name=level, simd=level) for level in SIMD_LEVELS)


def marks_of(place: Place) -> list[pytest.MarkDecorator]:
    if not place.runs_cuda:
        return []
    return [pytest.mark.gpu if place.device == "cuda" else pytest.mark.cuda_on_cpu]


@contextlib.contextmanager
def entered(place: Place, request: pytest.FixtureRequest) -> Iterator[Place]:
    """A copy of the place, set up for a test; that its kernels ran is asserted."""
    place = replace(place)
    if place.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    module = before = None
    if place.runs_cuda and place.device == "cpu":
        module = request.getfixturevalue("cuda_on_cpu")
        before = module.launches()
    if place.simd is not None and place.simd not in build_info()["simd_supported"]:
        pytest.skip(f"this machine has no {place.simd}")
    simd = use_simd(place.simd) if place.simd else contextlib.nullcontext()
    with simd, pytest.MonkeyPatch.context() as patch:
        for target in place.patches:
            patch.setattr(*target)
        yield place
    if module is not None and place.must_launch:
        assert module.launches() > before, "no CUDA kernel ran"


def place_fixture(places: tuple[Place, ...]) -> Any:
    """A fixture that runs a test at each of the places."""

    @pytest.fixture(params=[pytest.param(p, marks=marks_of(p), id=p.name) for p in places])
    def place(request: pytest.FixtureRequest) -> Iterator[Place]:
        with entered(request.param, request) as here:
            yield here

    return place

"""The warp-wide functions that kernels are built from, run on the CPU, against plain arithmetic."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.cuda_on_cpu
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(params=["forward", "reverse", "shuffled", "uneven"])
def module(request: pytest.FixtureRequest, cuda_on_cpu: ModuleType) -> ModuleType:
    cuda_on_cpu.set_order(request.param, 3)
    return cuda_on_cpu


def tensor(values: list[float], *shape: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(shape)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_matrix_product(module: ModuleType, kind: str) -> None:
    depth = 8 if kind == "tf32" else 16
    a, b = torch.randn(16, depth), torch.randn(depth, 8)
    found = tensor(module.run_matrix_product(kind, a.flatten().tolist(), b.flatten().tolist()), 16, 8)
    if kind == "tf32":
        # Ten bits of mantissa: the lower thirteen are rounded away, ties away from zero.
        a, b = (((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b))
    else:
        a, b = a.to(DTYPES[kind]), b.to(DTYPES[kind])
    torch.testing.assert_close(found, a.double() @ b.double(), rtol=0, atol=1e-5)


def test_warp(module: ModuleType) -> None:
    x = torch.randn(32)
    sums, largest, rotated, swapped, groups, down, up, votes = tensor(module.run_warp(x.tolist()), 8, 32)
    x = x.double()
    torch.testing.assert_close(sums, x.sum().expand(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(groups, x.view(4, 8).sum(1).repeat_interleave(8), rtol=0, atol=1e-5)
    assert largest.equal(x.max().expand(32))
    assert rotated.equal(x.roll(-1))
    assert swapped.equal(x.view(16, 2).flip(1).flatten())
    assert down.equal(torch.cat([x[3:], x[-3:]]))
    assert up.equal(torch.cat([x[:3], x[:-3]]))
    assert votes.equal((x > 0).double())


def test_block(module: ModuleType) -> None:
    x = torch.randn(96)
    sums, counts = tensor(module.run_block(x.tolist()), 2, 96)
    torch.testing.assert_close(sums, x.double().sum().expand(96), rtol=0, atol=1e-5)
    assert counts.equal((x > 0).sum().double().expand(96))


@pytest.mark.parametrize("valid", [64, 40, 0])
def test_copies(module: ModuleType, valid: int) -> None:
    x = torch.randn(64)
    found = tensor(module.run_copies(x.tolist(), valid), 64)
    x[valid:] = 0
    assert found.equal(x.double())


@pytest.mark.parametrize("kind", DTYPES)
def test_rounding(module: ModuleType, kind: str) -> None:
    odd = [
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        1.0,
        65504.0,
        65519.9,
        65520.0,
        3.3e38,
        3.4e38,
        1e-8,
        6e-8,
    ]
    halves = torch.arange(1, 9) * 2**-9 + 1  # ties, to even
    x = torch.cat([torch.tensor(odd), halves, torch.randn(108) * 10 ** torch.empty(108).uniform_(-9, 5)])
    alone, packed = tensor(module.run_rounding(kind, x.tolist()), 2, len(x))
    assert alone.equal(x.to(DTYPES[kind]).double())
    assert packed.equal(alone)
    both = tensor(module.run_rounding(kind, [float("nan"), 1.0]), 2, 2)
    assert both[:, 0].isnan().all() and (both[:, 1] == 1).all()

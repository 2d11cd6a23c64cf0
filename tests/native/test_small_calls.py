"""scripts/small_calls.py: every operator is called, and without libraries no product is a library's."""

from __future__ import annotations

import contextlib
import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import quietstar_ext

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "small_calls.py"
OPERATORS = ("sampling", "cross_entropy", "mixing", "attention")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_calls", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Products(TorchDispatchMode):
    """Counts the matrix products that come this far."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in func.name() for part in ("mm", "matmul", "linear", "baddbmm", "dot", "mv")):
            self.seen[func.name()] += not func.name().startswith("quietstar")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_without_libraries(script: ModuleType, operator: str, dtype: torch.dtype) -> None:
    """Inside operators and their backward passes, too; the results are the same but for rounding."""
    found = []
    for way in (contextlib.nullcontext, script.WithoutLibraries):
        torch.manual_seed(1)
        with Products() as products, way() as mode:
            results = [call() for _, call in getattr(script, operator)("cpu", dtype)]
        found.append((results, sum(products.seen.values())))
    (plain, _), (other, left) = found
    assert left == 0 and plain
    assert mode.replaced >= {"attention": 0, "sampling": 5}.get(operator, 3 * len(plain))
    for mine, theirs in zip(plain, other, strict=True):
        assert script.finite(theirs)
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (mine, theirs)), strict=True):
            if a.is_floating_point():
                error = (a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-9)
                assert error < 40 * torch.finfo(dtype).eps


def test_every_fused_operator_is_called(script: ModuleType) -> None:
    names = {
        name.split()[0]
        for operator in OPERATORS
        for name, _ in getattr(script, operator)("cpu", torch.float32)
    }
    others = {"thought_attention_with_lse"}  # the same kernels
    fused = {
        name
        for name in quietstar_ext.__all__
        if name.startswith(("linear", "thought", "mixing", "sample"))
    }
    assert names == fused - others

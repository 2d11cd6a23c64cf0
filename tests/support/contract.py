"""What the tests of all operators need to know of one; the table is in operator_table.py.

A call is a dictionary of keyword arguments of the public function. Floating-point tensors that have
gradients are leaves that require them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from attention_cases import gradients
from places import PLACES, Place
from sample_tokens_cases import same_draws
from torch import Tensor

Call = dict[str, Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Operator:
    """What the tests of the contract know of an operator.

    Attributes:
        function: the public function.
        calls: calls on the CPU in a dtype; they cover the options.
        errors: changes of ``sound`` (the first call), each a value or a function of the one before, and
            the message of the ValueError, or of the TypeError where something is no tensor.
        derived: a call whose second derivatives are finite, where the first one's are not.
        empty: calls without rows, columns or keys.
        registered: calls of the operators below the public function, on a device in a dtype.
        launches: how many CUDA kernels the first call and its gradients start.
        plain: the same by PyTorch's own functions, in any dtype; None where draws are compared instead.
        budget: a call without options that is large enough to measure errors; ``draws`` of them are
            added up, where their errors differ by chance.
        max_errors: the largest error of a tensor is what counts, and not its norm.
        same_bits: on a GPU it gives the same bits again, as no product of PyTorch's is part of it.
    """

    function: Callable[..., Any]
    calls: Callable[[torch.dtype], list[Call]]
    errors: list[tuple[Call, str]]
    empty: Callable[[torch.dtype], list[Call]]
    registered: Callable[[str, torch.dtype], Iterator[tuple[Any, tuple[Any, ...]]]]
    sound: Callable[[], Call] | None = None
    derived: Callable[[], Call] | None = None
    launches: int = 1
    plain: Callable[..., tuple[Tensor, ...]] | None = None
    budget: Callable[[torch.dtype], Call] | None = None
    draws: int = 1
    max_errors: bool = True
    same_bits: bool = False
    places: tuple[Place, ...] = PLACES

    @property
    def name(self) -> str:
        return self.function.__name__

    def outputs(self, call: Call, impl: str) -> tuple[Tensor, ...]:
        result = self.function(**call, impl=impl)
        return result if isinstance(result, tuple) else (result,)

    def everything(self, call: Call, impl: str) -> list[Tensor]:
        """Outputs, and the gradients of a fixed random combination of them."""
        return with_gradients(self.outputs(call, impl), call)


def leaves(call: Call) -> dict[str, Tensor]:
    return {k: v for k, v in call.items() if isinstance(v, Tensor) and v.requires_grad}


def with_gradients(outputs: tuple[Tensor, ...], call: Call) -> list[Tensor]:
    inputs = list(leaves(call).values())
    differentiable = [o for o in outputs if o.requires_grad]
    grads = gradients(differentiable, inputs) if differentiable else ()
    return [*(o.detach() for o in outputs), *grads]


def changed(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """Every tensor changed, leaves into leaves."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return change(value.detach()).detach().requires_grad_(value.requires_grad)

    return {name: one(value) for name, value in call.items()}


def moved(call: Call, device: str) -> Call:
    """The call on a device; banned ids, too, so that nothing waits for them."""
    ids = {k: torch.tensor(v) for k, v in call.items() if k == "banned" and device != "cpu"}
    return changed(call | ids, lambda t: t.to(device))


def exact(call: Call) -> Call:
    return changed(call, lambda t: t.double() if t.is_floating_point() else t)


def same(operator: Operator, got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """The same bits, where the operator promises that."""
    if operator.same_bits:
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    close(operator, got, wanted, dtype)


def close(operator: Operator, got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """Equal but for the rounding of sums in another order; draws may change at an interval's edge."""
    assert len(got) == len(wanted)
    if operator.plain is None:
        # A 16-bit logit may be rounded to its other neighbour.
        atol = torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-5
        return same_draws(got, wanted, atol=atol, rtol=1e-5)
    unit = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    for a, b in zip(got, wanted, strict=True):
        size = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=unit * max(1.0, size))


def within_budget(
    operator: Operator,
    dtype: torch.dtype,
    impl: str,
    device: str = "cpu",
    factor: float = 1.0,
    units: float | None = None,
) -> None:
    """Our error against the fp64 truth is within ``factor`` times that of PyTorch's own functions in the
    same dtype, and so many units of rounding of the result."""
    assert operator.plain is not None and operator.budget is not None

    def size(tensor: Tensor) -> float:
        return float(tensor.abs().max() if operator.max_errors else tensor.norm())

    sums: list[list[float]] = []
    for _ in range(operator.draws):  # single draws differ: where theirs cancel, ours need not
        call = moved(operator.budget(dtype), device)
        ours = operator.everything(call, impl)
        theirs, truth = (with_gradients(operator.plain(**c), c) for c in (call, exact(call)))
        assert [t.dtype for t in ours[-len(leaves(call)) :]] == [dtype] * len(leaves(call))
        sums.append(
            [
                number
                for a, b, t in zip(ours, theirs, truth, strict=True)
                for number in (size(a.double() - t), size(b.double() - t), size(t))
            ]
        )
    totals = torch.tensor(sums).double().sum(0).view(-1, 3)
    # In fp32 both are sums in some order, so neither is the better one.
    unit = torch.finfo(dtype).eps * (units or (4 if dtype == torch.float32 else 1))
    for i, (error, budget, whole) in enumerate(totals.tolist()):
        assert error <= factor * budget + unit * whole, f"result {i}: {error:.3g} > {budget:.3g}"


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the call, run once on a stream beside the main one, and its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results

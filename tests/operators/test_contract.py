"""What every operator promises, at every place it runs; the table is in tests/support."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from contract import (
    DTYPES,
    Call,
    Operator,
    captured,
    changed,
    close,
    exact,
    leaves,
    moved,
    same,
    with_gradients,
    within_budget,
)
from operator_table import OPERATORS
from places import CPU, CUDA, CUDA_ON_CPU, Place, entered, marks_of, place_fixture
from poison import poisoned_memory
from torch import Tensor

Subject = tuple[Operator, Place]
ORDERS = ["forward", "reverse", "shuffled", "uneven"]

by_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
with_budget = pytest.mark.parametrize(
    "operator", [o for o in OPERATORS if o.plain], ids=lambda o: o.name
)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(
    params=[
        pytest.param((operator, place), marks=marks_of(place), id=f"{operator.name} on {place.name}")
        for operator in OPERATORS
        for place in operator.places
    ]
)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    operator, place = request.param
    with entered(place, request) as here:
        yield operator, here


kernel_place = place_fixture((CPU, CUDA_ON_CPU, CUDA))


def calls_of(operator: Operator, place: Place) -> list[Call]:
    return [moved(call, place.device) for call in operator.calls(place.dtype)]


@by_dtype
def test_error_budget(subject: Subject, dtype: torch.dtype) -> None:
    operator, place = subject
    if operator.plain is None:
        place.must_launch = False
        pytest.skip("draws are compared with the reference's")
    # thought_attention's kernels on CUDA round the weights of the softmax, which PyTorch's do not.
    rounds = operator.name == "thought_attention" and place.runs_cuda
    twice = {"factor": 2.0, "units": 8 if dtype == torch.float32 else 2} if rounds else {}
    within_budget(operator, dtype, place.impl, place.device, **twice)


@by_dtype
@with_budget
def test_error_budget_at_every_instruction_set(
    simd: str, operator: Operator, dtype: torch.dtype
) -> None:
    within_budget(operator, dtype, "fused")


@by_dtype
def test_registered_well(kernel_place: Place, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and kernel_place.device == "cpu":
        kernel_place.must_launch = False
        pytest.skip("the dtype changes nothing")
    for operator in OPERATORS:
        for registered, arguments in operator.registered(kernel_place.device, dtype):
            torch.library.opcheck(registered, arguments)


def test_compiles_as_one_graph(subject: Subject) -> None:
    operator, place = subject
    for call in calls_of(operator, place):
        torch.compiler.reset()
        tensors = {k: v for k, v in call.items() if isinstance(v, Tensor)}
        options = {k: v for k, v in call.items() if k not in tensors}

        @torch.compile(fullgraph=True, backend="aot_eager")
        def compiled(tensors, options=options):
            return operator.outputs(tensors | options, place.impl)

        got = with_gradients(compiled(tensors), call)
        close(operator, got, operator.everything(call, place.impl), place.dtype)


def in_gaps(t: Tensor, before: int = 1, behind: int = 2) -> Tensor:
    """A view with gaps on every side, which hold NaN, or an index out of range."""
    fill = torch.nan if t.is_floating_point() else 10**6
    memory = t.new_full([before + size + behind for size in t.shape], fill)
    return memory[tuple([slice(before, -behind)] * t.ndim)].copy_(t)


def unaligned(t: Tensor) -> Tensor:
    """Contiguous, and one element behind a multiple of 16 bytes."""
    return t.new_full((t.numel() + 8,), 7)[1 : 1 + t.numel()].view(t.shape).copy_(t)


LAYOUTS = {
    "in gaps": in_gaps,
    "in aligned gaps": lambda t: in_gaps(t, 8, 8),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "reversed": lambda t: t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1]),
    "heads last": lambda t: t.movedim(1, -2).contiguous().movedim(-2, 1) if t.ndim > 2 else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "unaligned": unaligned,
    "expanded": lambda t: t[:1].expand_as(t),
    "expanded inside": lambda t: t.narrow(-2, 0, 1).expand_as(t) if t.ndim > 1 and t.numel() else t,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strided_inputs(subject: Subject, layout: Any) -> None:
    operator, place = subject
    for dtype in DTYPES if place.runs_cuda else [place.dtype]:
        for call in operator.calls(dtype):
            call = changed(moved(call, place.device), layout)
            plain = changed(call, lambda t: t.clone(memory_format=torch.contiguous_format))
            got, wanted = (operator.everything(c, place.impl) for c in (call, plain))
            close(operator, got, wanted, dtype)


def test_autocast(subject: Subject) -> None:
    """Inputs are cast as a product's are, whatever their dtype; gradients come in that of the leaf."""
    operator, place = subject
    for call in operator.calls(torch.float32):
        call = moved(call, place.device)
        floats = [k for k, v in call.items() if isinstance(v, Tensor) and v.is_floating_point()]
        products = [k for k in floats if k not in ("row_weights", "sinks", "logits")]
        narrow = {k: call[k].detach().bfloat16().requires_grad_(call[k].requires_grad) for k in products}
        wanted = operator.everything(call | narrow, place.impl)
        for given in (call, call | {k: narrow[k] for k in products[:1]}):
            with torch.autocast(place.device, torch.bfloat16):
                outputs = operator.outputs(given, place.impl)
            count = len(outputs)
            got = with_gradients(outputs, given)
            assert [t.dtype for t in got[:count]] == [t.dtype for t in wanted[:count]]
            assert all(torch.equal(a, b) for a, b in zip(got[:count], wanted[:count], strict=True))
            assert [t.dtype for t in got[count:]] == [t.dtype for t in leaves(given).values()]


@by_dtype
def test_empty(subject: Subject, dtype: torch.dtype) -> None:
    operator, place = subject
    place.must_launch = False
    for call in operator.empty(dtype):
        call = moved(call, place.device)
        outputs = operator.outputs(call, place.impl)
        for a, b in zip(outputs, operator.outputs(exact(call), "reference"), strict=True):
            assert a.shape == b.shape and (not a.isfinite().all() or not a.any())
            assert torch.equal(a, b.to(a.dtype))
        grads = with_gradients(outputs, call)[len(outputs) :]
        assert [g.shape for g in grads] == [t.shape for t in leaves(call).values()]
        assert not any(grad.any() for grad in grads)


@by_operator
@by_dtype
def test_poisoned_memory(operator: Operator, dtype: torch.dtype) -> None:
    """Whatever the memory of results and workspace holds, nothing of it is read."""
    for call in operator.calls(dtype):
        wanted = operator.everything(call, "fused")
        with poisoned_memory():
            assert torch.empty(3).isnan().all()
            got = operator.everything(call, "fused")
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_inputs_are_not_modified(subject: Subject) -> None:
    operator, place = subject
    for call in calls_of(operator, place):
        before = changed(call, torch.clone)
        operator.everything(call, place.impl)
        for name, value in call.items():
            assert not isinstance(value, Tensor) or torch.equal(value, before[name]), name


def test_some_gradients_alone(subject: Subject) -> None:
    """Of one input at a time, and of none."""
    operator, place = subject
    for call in calls_of(operator, place):
        names = list(leaves(call))
        frozen = call | {name: call[name].detach() for name in names}
        outputs = operator.outputs(frozen, place.impl)
        assert not any(o.requires_grad for o in outputs)
        wanted = operator.everything(call, place.impl)
        close(operator, list(outputs), wanted[: len(outputs)], place.dtype)
        for name, grad in zip(names, wanted[len(outputs) :], strict=True):
            got = operator.everything(frozen | {name: call[name]}, place.impl)
            close(operator, got, [*wanted[: len(outputs)], grad], place.dtype)


@by_operator
def test_fused_never_falls_back(operator: Operator) -> None:
    call = operator.calls(torch.float64)[0]
    with pytest.raises(RuntimeError, match=f"{operator.name}: impl='fused' cannot.*not float64"):
        operator.function(**call, impl="fused")


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [(operator, *error) for operator in OPERATORS for error in operator.errors],
    ids=[f"{o.name}-{message}" for o in OPERATORS for _, message in o.errors],
)
def test_errors(operator: Operator, change: Call, message: str, impl: str) -> None:
    call = operator.sound() if operator.sound else operator.calls(torch.float32)[0]
    for name, new in change.items():
        call[name] = new(call[name]) if callable(new) and not isinstance(new, Tensor) else new
    kind = TypeError if "expected a torch" in message else ValueError
    with pytest.raises(kind, match=message):
        operator.function(**{"impl": impl} | call)


# ---- CUDA


@by_operator
@by_dtype
@pytest.mark.cuda_on_cpu
def test_the_order_of_threads_changes_no_bit(
    cuda_on_cpu: ModuleType, operator: Operator, dtype: torch.dtype
) -> None:
    large = [operator.budget(dtype)] if operator.budget else []
    for call in (*operator.calls(dtype), *large):
        results = []
        for order in ORDERS:
            cuda_on_cpu.set_order(order, torch.initial_seed())
            results.append(operator.everything(call, "fused"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@by_operator
@pytest.mark.cuda_on_cpu
def test_a_failed_launch_is_an_error(cuda_on_cpu: ModuleType, operator: Operator) -> None:
    call = operator.calls(torch.float32)[0]
    before = cuda_on_cpu.launches()
    wanted = operator.everything(call, "fused")
    assert cuda_on_cpu.launches() - before == operator.launches
    for skip in range(operator.launches):
        cuda_on_cpu.fail_launch(skip)
        with pytest.raises(RuntimeError, match="kernel .*: injected launch failure"):
            operator.everything(call, "fused")
        again = operator.everything(call, "fused")
        assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


def step(operator: Operator, call: Call) -> list[Tensor]:
    """Outputs and gradients, without anything that waits for the device."""
    outputs = operator.outputs(call, "fused")
    through = [o for o in outputs if o.requires_grad]
    if not through:
        return list(outputs)
    ones = [torch.ones_like(o) for o in through]
    return [*outputs, *torch.autograd.grad(through, list(leaves(call).values()), ones)]


@by_operator
@by_dtype
class TestOnAGpu:
    pytestmark = needs_gpu

    def test_a_graph_sees_new_inputs(self, operator: Operator, dtype: torch.dtype) -> None:
        for call in operator.calls(dtype):
            call = moved(call, "cuda")
            graph, found = captured(functools.partial(step, operator, call))
            with torch.no_grad():
                for tensor in call.values():
                    if isinstance(tensor, Tensor):
                        tensor.copy_(tensor.flip(0))
            graph.replay()
            same(operator, found, step(operator, call), dtype)

    def test_does_not_wait_for_the_device(self, operator: Operator, dtype: torch.dtype) -> None:
        for call in operator.calls(dtype):
            call = moved(call, "cuda")
            step(operator, call)
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(operator, call)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_another_stream(self, operator: Operator, dtype: torch.dtype) -> None:
        call = moved(operator.calls(dtype)[0], "cuda")
        wanted = operator.everything(call, "fused")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            later = changed(call, torch.clone)
            got = operator.everything(later, "fused")
        stream.synchronize()
        same(operator, got, wanted, dtype)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
    def test_another_device(self, operator: Operator, dtype: torch.dtype) -> None:
        call = operator.calls(dtype)[0]
        first, second = (
            operator.everything(moved(call, f"cuda:{number}"), "fused") for number in range(2)
        )
        assert torch.cuda.current_device() == 0
        assert all(t.device == torch.device("cuda:1") for t in second)
        same(operator, [t.cpu() for t in second], [t.cpu() for t in first], dtype)

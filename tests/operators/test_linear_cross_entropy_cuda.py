"""The CUDA path of linear_cross_entropy: the same tests on a CPU (cuda_on_cpu) and a device (gpu)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import Operator, captured, within_budget
from linear_cross_entropy_cases import IN_CHUNKS, WAYS, Watch, row_by_row
from linear_cross_entropy_cases import made as made_there
from operator_table import OPERATORS
from places import CUDA
from torch import Tensor

from quietstar_ext import checks, operators
from quietstar_ext.linear_cross_entropy import cuda, linear_cross_entropy, linear_cross_entropy_sum
from quietstar_ext.linear_cross_entropy.call import Products
from quietstar_ext.linear_cross_entropy.softmax import SoftmaxCrossEntropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "WAIT_FOR_FLOP", WAYS[way])


def made(device: str, *sizes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return made_there(replace(CUDA, device=device), *sizes, dtype=dtype)


@pytest.mark.parametrize("accumulate", ["float32", "parameter"])
@pytest.mark.parametrize("operator", OPERATORS[:2], ids=lambda o: o.name)
def test_error_budget(
    device: str, operator: Operator, accumulate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 over several chunks, whichever way they are summed."""
    for way in WAYS:
        take(way, monkeypatch)
        for patch in IN_CHUNKS:
            monkeypatch.setattr(*patch)
        chosen = replace(operator, budget=lambda d: operator.budget(d) | {"accumulate": accumulate})
        within_budget(chosen, torch.bfloat16, "fused", device)


def test_sums_in_float32_round_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 over 24 chunks: summed in fp32 the error is that of one chunk, otherwise it grows."""
    monkeypatch.setattr(cuda, "ROW_UNIT", 1)
    hidden, weight, targets = made(device, 48, 16, 40, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (truth,) = torch.autograd.grad(row_by_row(*exact, targets).sum(), exact[1])

    def error(rows: int, accumulate: str) -> float:
        monkeypatch.setattr(cuda, "WORKSPACE_BYTES", rows * (64 + 16) * 2)
        nll = linear_cross_entropy(hidden, weight, targets, accumulate=accumulate, impl="fused")
        (grad,) = torch.autograd.grad(nll.sum(), weight)
        return float((grad.double() - truth).norm() / truth.norm())

    at_once, wide, narrow = error(48, "parameter"), error(2, "float32"), error(2, "parameter")
    assert wide < 1.2 * at_once
    assert narrow > 1.2 * at_once
    assert narrow < 10 * at_once


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are looked at on the CPU only, not on a device."""
    monkeypatch.setattr(checks, "check_index_range", lambda *_, **__: None)


def products_of(call: Any, hidden: Tensor, weight: Tensor) -> tuple[int, set[str]]:
    """How many matrix products a call makes, and which operators it waits for."""
    reading: set[str] = set()

    class Noted(Watch):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func._schema.name
            if name in ("aten::_local_scalar_dense", "aten::nonzero"):
                reading.add(name)
            if name.startswith("quietstar::"):  # look inside
                with self:
                    return operators.implementations[name](*args)
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Noted(hidden, weight) as watch:
        call()
    return len(watch.products), reading


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("reduction", "products", "waits"),
    [("sum", 3, False), ("mean", 3, True), ("weighted", 5, True)],
)
def test_products_and_waits(
    device: str, reduction: str, products: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three products where all rows count the same; waiting is only for what saves some."""
    hidden, weight, targets = made(device, 20, 8, 30)
    targets[1] = 3
    row_weights = torch.rand(20, device=device)

    def call(result: list[Tensor]) -> None:
        nll = linear_cross_entropy(hidden, weight, targets, impl="fused")
        loss = {"sum": nll.sum, "mean": nll.mean}.get(reduction, lambda: (nll * row_weights).sum())()
        result += torch.autograd.grad(loss, (hidden, weight))

    counts = {"sum": 1.0, "mean": 1 / 20}.get(reduction, row_weights)
    wanted = torch.autograd.grad((row_by_row(hidden, weight, targets) * counts).sum(), (hidden, weight))
    for way in WAYS:
        take(way, monkeypatch)
        got: list[Tensor] = []
        made_products, reading = products_of(lambda got=got: call(got), hidden, weight)
        torch.testing.assert_close(got, list(wanted), **CLOSE)
        if way == "waiting":
            assert made_products == products
            assert ("aten::_local_scalar_dense" in reading) == waits
        else:
            assert made_products == (3 if reduction == "sum" else 5)
            assert not reading


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_sum_waits_once_at_most(device: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = made(device, 20, 8, 30)
    row_weights = (torch.rand(20, device=device) >= share).float()

    def call() -> None:
        loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl="fused")
        (7 * loss).backward()

    for way in WAYS:
        take(way, monkeypatch)
        made_products, reading = products_of(call, hidden, weight)
        assert made_products == 3
        assert reading == ({"aten::nonzero"} if way == "waiting" else set())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["all rows", "half of them", "capturing"])
def test_workspace(device: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and copies stay within the workspace; rows that take no part cost no product."""
    workspace = 60_000
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(cuda, "ROW_UNIT", 4)
    take("capturing" if kind == "capturing" else "waiting", monkeypatch)
    hidden, weight, targets = (t.detach() for t in made(device, 96, 5, 1000, dtype=dtype))
    live = torch.ones(96, dtype=torch.bool, device=device)
    if kind == "half of them":
        live[torch.randperm(96)[:48]] = False
    softmax = SoftmaxCrossEntropy(hidden, None, 1.0, None, 1.0)
    for accumulate in ("auto", "parameter") if dtype == torch.bfloat16 else ("auto",):
        with Watch(hidden, weight, targets) as watch:
            ones = torch.ones(96, device=device)
            call = Products(*(hidden, weight, targets, ones, live, softmax), *(True, True, accumulate))
            results = cuda.run(call)
        wide = dtype == torch.float16 or (dtype == torch.bfloat16 and accumulate == "auto")
        if device == "cuda" or not wide:  # (on the CPU 16-bit operands of an fp32 product are copied)
            assert watch.most <= workspace + sum(r.nbytes for r in results) + 96 * 40
        rows = [m for m, k, n in watch.products if (k, n) == (5, 1000)]
        assert len(rows) > 1
        assert sum(rows) == {"all rows": 96, "half of them": 48, "capturing": 96}[kind]


def test_chunks_of_the_sizes_that_are_promised() -> None:
    """8192 x 4096 onto 32,000 and 128,256 words within 256 MiB: 2 and 8 chunks of whole tiles."""
    for vocabulary, size in ((32_000, 4096), (128_256, 1024)):
        hidden = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(vocabulary, 4096, dtype=torch.bfloat16, device="meta")
        live = torch.empty(8192, dtype=torch.bool, device="meta")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "may_wait", lambda *_: True)
            patch.setattr(torch.Tensor, "nonzero", lambda self: self.new_empty(8192, 1))
            cut = cuda._Chunks(hidden, weight, live, 3, True, "auto")
        assert cut.size == size
        assert cut._buffer.nbytes <= 256 * 2**20
        assert not cut.wide


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestOnADevice:
    """What only a device can show."""

    def test_nothing_waits_in_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Below the size that is worth a wait, and for a sum's gradients at any size."""
        hidden, weight, targets = made("cuda", 500, 64, 1000)
        row_weights = torch.rand(500, device="cuda")
        banned = torch.tensor([1, 4], device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            nll = linear_cross_entropy(hidden, weight, targets, banned=banned, impl="fused")
            (nll * row_weights).sum().backward()
            loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl="fused")
            (3 * loss).backward()
            take("capturing", monkeypatch)
            linear_cross_entropy(hidden, weight, targets, impl="fused").sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("accumulate", ["float32", "parameter"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_graph(self, dtype: torch.dtype, accumulate: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A captured step follows its inputs: other targets, other rows without loss or weight."""
        monkeypatch.setattr(cuda, "WAIT_FOR_FLOP", 0)  # capturing alone must keep it from waiting
        monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 300 * 1088 * dtype.itemsize)
        hidden, weight, targets = made("cuda", 1000, 64, 1003, dtype=dtype)
        row_weights = torch.rand(1000, device="cuda")

        def step() -> list[Tensor]:
            options: dict[str, Any] = {"softcap": 20.0, "accumulate": accumulate, "impl": "fused"}
            loss, nll = linear_cross_entropy_sum(hidden, weight, targets, row_weights, **options)
            rows = linear_cross_entropy(hidden, weight, targets, **options)
            total = loss + (rows * row_weights).sum() + rows.sum()
            return [loss, nll, rows, *torch.autograd.grad(total, (hidden, weight))]

        graph, found = captured(step)
        for _ in range(3):
            with torch.no_grad():
                hidden.normal_()
                weight.normal_()
                row_weights.uniform_().mul_(torch.rand_like(row_weights) < 0.5)
                targets.random_(0, 1003)
                targets.masked_fill_(torch.rand_like(row_weights) < 0.3, -100)
            graph.replay()
            got = [t.clone() for t in found]
            eps = max(1e-5, 4 * torch.finfo(dtype).eps)
            for a, b in zip(got, step(), strict=True):
                torch.testing.assert_close(a, b, rtol=eps, atol=eps * float(b.abs().max()))

    @pytest.mark.parametrize("vocabulary", [32_000, 128_256])
    def test_large_shapes(self, vocabulary: int) -> None:
        """At the sizes of real models, in bfloat16, against fp64 on a few rows and words."""
        hidden, weight, targets = made("cuda", 4100, 1024, vocabulary, dtype=torch.bfloat16)
        with torch.no_grad():
            weight.div_(32)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        row_weights = torch.rand(4100, device="cuda")
        loss, nll = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl="fused")
        extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
        assert extra <= 256 * 2**20 + 2**22
        grads = torch.autograd.grad(loss, (hidden, weight))
        rows = torch.randperm(4100)[:50]
        logits = hidden.detach()[rows].double() @ weight.detach().double().T
        live = (targets[rows] != -100).double()
        picked = targets[rows].clamp(min=0)[:, None]
        true = (logits.logsumexp(1) - logits.gather(1, picked)[:, 0]) * live
        torch.testing.assert_close(nll[rows].double(), true, rtol=1e-2, atol=2e-2)
        p = logits.softmax(1).scatter_add(1, picked, -torch.ones_like(picked).double())
        true_grad = (p * (live * row_weights[rows])[:, None]) @ weight.detach().double()
        error = (grads[0][rows].double() - true_grad).norm() / true_grad.norm()
        assert error < 1e-2
        assert float(grads[1].float().norm()) > 0

    def test_more_than_2_31_logits(self) -> None:
        """The kernel on one tile of 4.3 GB: its last rows are those of a small tile."""
        rows, words = 17_000, 128_256
        assert rows * words > 2**31
        logits = torch.empty(rows, words, dtype=torch.bfloat16, device="cuda").normal_()
        targets = torch.randint(0, words, (rows,), device="cuda")
        row_weights = torch.rand(rows, device="cuda")
        last = slice(rows - 3, rows)
        alone = logits[last].clone()
        softmax = SoftmaxCrossEntropy(logits, None, 1.0, None, 1.0)
        nll = torch.full((rows,), torch.nan, device="cuda")
        kernel = cuda._Kernel(softmax, logits.T)
        kernel(logits, targets, None, nll, row_weights)
        nll_alone = torch.full((3,), torch.nan, device="cuda")
        kernel(alone, targets[last], None, nll_alone, row_weights[last])
        assert torch.equal(logits[last], alone)
        assert torch.equal(nll[last], nll_alone)
        assert nll.isfinite().all()

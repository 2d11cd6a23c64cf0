"""The CUDA path of linear_cross_entropy: the same tests on a CPU (cuda_on_cpu) and a device (gpu)."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from test_linear_cross_entropy import OPTIONS, Watch, make, row_by_row
from torch import Tensor

from quietstar_ext import checks
from quietstar_ext import linear_cross_entropy_chunks as chunks
from quietstar_ext import linear_cross_entropy_cuda as cuda
from quietstar_ext.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from quietstar_ext.linear_cross_entropy_cuda import _Kernel, scale_
from quietstar_ext.linear_cross_entropy_softmax import SoftmaxCrossEntropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN: dict[str, Any] = {"temperature": 1.0, "banned": None, "softcap": None, "logit_scale": 1.0}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
# How the rows that take part are found: looked up by waiting, or all rows worked on, as in a capture.
WAYS = ["waiting", "capturing"]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.cuda_on_cpu),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a test's tensors, on which the CUDA kernels run; that they did is asserted."""
    print(f"torch.manual_seed({torch.seed()})")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        yield "cuda"
        return
    module: ModuleType = request.getfixturevalue("cuda_on_cpu")
    before = module.launches()
    yield "cpu"
    assert module.launches() > before, "no CUDA kernel ran"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return str(request.param)


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "WAIT_FOR_FLOP", 0 if way == "waiting" else float("inf"))


def made(
    device: str, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets = make(*sizes, dtype=dtype, **options)
    there = [t.detach().to(device).requires_grad_() for t in (hidden, weight)]
    return there[0], there[1], targets.to(device)


def unaligned(rows: int, words: int, dtype: torch.dtype, offset: int, gap: int, device: str) -> Tensor:
    """Random logits that begin ``offset`` elements into memory full of NaN, rows ``gap`` apart."""
    memory = torch.full((offset + rows * (words + gap) + 16,), torch.nan, dtype=dtype, device=device)
    logits = memory[offset:][: rows * (words + gap)].view(rows, words + gap)[:, :words]
    return logits.copy_(torch.randn(rows, words) * 3)


#                 rows  words  offset  gap
LAYOUTS = {
    "one element": (1, 1, 0, 0),
    "one pack": (2, 8, 0, 0),
    "less than a pack": (3, 3, 1, 2),
    "aligned": (5, 64, 0, 0),
    "every offset": (19, 301, 3, 0),
    "padded": (4, 1003, 0, 5),
    "several loads": (2, 9001, 1, 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_kernel(
    device: str, options: dict[str, Any], layout: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Loss and gradient of logits wherever they lie, against fp64; nothing beside them is written."""
    rows, words, offset, gap = layout
    if words * rows > 5000 and device == "cpu" and dtype != torch.bfloat16:
        rows = min(rows, 3)
    options = PLAIN | options
    if options["banned"] is not None:
        few = [v for v in options["banned"] if v < words - 1] * 2
        options["banned"] = torch.tensor(few, device=device) if few else None
    logits = unaligned(rows, words, dtype, offset, gap, device)
    targets = torch.randint(0, words, (rows,), device=device)
    targets[: rows // 2] = words - 1
    row_weights = torch.randn(rows, device=device)
    live = torch.rand(rows, device=device) < 0.7
    live[-1] = True
    check_kernel(logits, targets, row_weights, live, options)
    memory = torch.empty(0, dtype=dtype, device=device).set_(logits.untyped_storage())
    assert memory.isnan().sum() == memory.numel() - logits.numel()


def check_kernel(
    logits: Tensor, targets: Tensor, row_weights: Tensor, live: Tensor, options: dict[str, Any]
) -> None:
    """Run the kernel on logits, without and with gradient, and compare with fp64."""
    rows, words = logits.shape
    exact = logits.double()
    plain = SoftmaxCrossEntropy(exact, **options)
    assert not plain.fused
    wanted, *sums = plain.loss(exact, targets)
    plain.gradient_(exact, targets, row_weights, *sums)
    wanted.masked_fill_(~live, 0)
    exact.masked_fill_(~live[:, None], 0)

    kernel = _Kernel(SoftmaxCrossEntropy(logits, **options), logits.new_empty(words, 1))
    nll = torch.full((2, rows), torch.nan, device=logits.device)
    before = logits.clone()
    kernel(logits, targets, live, nll[0], None)
    assert torch.equal(logits, before)
    kernel(logits, targets, live, nll[1], row_weights)
    for each in nll:
        torch.testing.assert_close(each.double(), wanted, **CLOSE)
    rtol = max(3e-5, torch.finfo(logits.dtype).eps)
    atol = 1e-7 if logits.dtype == torch.float16 else 1e-12
    # (With softcap, y has the rounding of cap · tanh.)
    torch.testing.assert_close(logits.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.cuda_on_cpu
def test_kernel_in_any_order_of_threads(cuda_on_cpu: ModuleType, order: str) -> None:
    """More rows than blocks, so that a block's shared memory is used again; the same bits each time."""
    logits = torch.randn(40, 203).bfloat16()
    targets, row_weights = torch.randint(0, 203, (40,)), torch.randn(40)
    results = []
    for each in ("forward", order):
        cuda_on_cpu.set_order(each, 5)
        x, nll = logits.clone(), torch.full((40,), torch.nan)
        _Kernel(SoftmaxCrossEntropy(x, torch.tensor([7, 99]), 1.0, None, 1.0), x.T)(
            x, targets, None, nll, row_weights
        )
        results.append((x, nll))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_longer_than_shared_memory(device: str, dtype: torch.dtype) -> None:
    """What does not stay in shared memory is read again."""
    words = (164 if device == "cpu" else 300) * 1024 // dtype.itemsize + 4099
    logits = unaligned(2, words, dtype, 5, 3, device)
    targets = torch.tensor([words - 40, 40], device=device)
    options = PLAIN | {"banned": torch.tensor([0, words - 1, words - 30], device=device)}
    check_kernel(
        logits,
        targets,
        torch.tensor([0.5, -2.0], device=device),
        torch.tensor([True, True], device=device),
        options,
    )


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_any_number_of_banned_words(device: str, share: float) -> None:
    """Including targets: their loss is inf, and their gradient that of the log-sum-exp."""
    logits = unaligned(9, 709, torch.float32, 2, 1, device)
    targets = torch.randint(0, 709, (9,), device=device)
    banned = (torch.rand(709) < share).nonzero()[:, 0]
    outside = torch.tensor([-1, 709, 720, 2**40])  # neither read nor written past the mask
    kernel = _Kernel(
        SoftmaxCrossEntropy(logits, torch.cat([banned, outside]).to(device), 1.0, None, 1.0), logits.T
    )
    plain = SoftmaxCrossEntropy(logits.double(), banned.to(device), 1.0, None, 1.0)
    exact = logits.double()
    wanted, *sums = plain.loss(exact, targets)
    plain.gradient_(exact, targets, torch.ones(9, device=device), *sums)
    nll = torch.full((9,), torch.nan, device=device)
    kernel(logits, targets, None, nll, torch.ones(9, device=device))
    torch.testing.assert_close(nll.double(), wanted, **CLOSE)
    torch.testing.assert_close(logits.double(), exact, rtol=3e-5, atol=1e-12)
    assert nll.isinf().tolist() == torch.isin(targets.cpu(), banned).tolist()


def test_an_almost_certain_target_loses_no_digits(device: str) -> None:
    """1 - p and -log p near p = 1, where subtracting would leave nothing."""
    logits = torch.randn(6, 500, device=device)
    targets = torch.randint(0, 500, (6,), device=device)
    above = torch.tensor([5.0, 10, 15, 20, 30, 60], device=device)
    logits.scatter_(1, targets[:, None], above[:, None])
    others = logits.double().scatter(1, targets[:, None], -torch.inf).logsumexp(1) - above.double()
    nll = torch.full((6,), torch.nan, device=device)
    kernel = _Kernel(SoftmaxCrossEntropy(logits, None, 1.0, None, 1.0), logits.T)
    kernel(logits, targets, None, nll, torch.ones(6, device=device))
    torch.testing.assert_close(nll.double(), others.exp().log1p(), rtol=1e-5, atol=0)
    at_target = logits.gather(1, targets[:, None])[:, 0].double()
    torch.testing.assert_close(at_target, -others.sigmoid(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_huge_and_infinite_logits(device: str, softcap: float | None) -> None:
    logits = torch.randn(21, 50, device=device)
    logits[1] *= 1e30
    logits[2, 3:40] = -torch.inf
    logits[4] = -1e38
    logits[5] = 1e38
    targets = torch.randint(0, 3, (21,), device=device)
    live = torch.ones(21, dtype=torch.bool, device=device)
    check_kernel(logits, targets, torch.ones(21, device=device), live, PLAIN | {"softcap": softcap})


def test_a_nan_or_a_wrong_target_stays_in_its_row(device: str) -> None:
    """A row that takes no part is not even read."""
    logits = torch.randn(21, 90, device=device)
    logits[[5, 6], 70] = torch.nan
    targets = torch.zeros(21, dtype=torch.int64, device=device)
    targets[8], targets[9] = 90, -100
    live = torch.ones(21, dtype=torch.bool, device=device)
    live[6] = False
    weights = torch.ones(21, device=device)
    weights[11] = 0
    nll = torch.full((21,), torch.nan, device=device)
    kernel = _Kernel(SoftmaxCrossEntropy(logits, None, 1.0, None, 1.0), logits.T)
    kernel(logits, targets, live, nll, weights)
    assert nll.isnan().nonzero().flatten().tolist() == [5, 8, 9]
    assert logits.isnan().any(1).nonzero().flatten().tolist() == [5, 8, 9]
    assert nll[6] == 0
    assert nll[11] > 0
    assert not logits[[6, 11]].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_rows_equal_row_by_row(device: str, way: str, options: dict[str, Any]) -> None:
    hidden, weight, targets = made(device)
    with torch.no_grad():
        hidden[1] = torch.nan  # an ignored row
    nll = linear_cross_entropy(hidden, weight, targets, **options, impl="fused")
    clean = hidden.detach().clone().nan_to_num_().requires_grad_()
    wanted = row_by_row(clean, weight, targets, **options)
    torch.testing.assert_close(nll, wanted, **CLOSE)
    grad = torch.randn_like(nll)
    grad[4] = 0
    got = torch.autograd.grad(nll, (hidden, weight), grad)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, (clean, weight), grad), **CLOSE)
    assert not got[0][[1, 4]].any()


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "keep"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_sum_equals_row_by_row(device: str, way: str, options: dict[str, Any], skip: bool) -> None:
    hidden, weight, targets = made(device)
    row_weights = torch.randn(len(targets), device=device)
    row_weights[[3, 6]] = 0
    loss, nll = linear_cross_entropy_sum(
        *(hidden, weight, targets, row_weights), **options, skip_zero_weight=skip, impl="fused"
    )
    wanted = row_by_row(hidden, weight, targets, **options)
    wanted_loss = (wanted * row_weights).sum()
    torch.testing.assert_close(loss, wanted_loss, **CLOSE)
    shown = torch.where((row_weights == 0) & skip, 0, wanted)
    torch.testing.assert_close(nll, shown.detach(), **CLOSE)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(3 * wanted_loss, (hidden, weight)), **CLOSE)
    assert not got[0][[1, 3, 6]].any()


@pytest.mark.parametrize(
    ("rows", "size", "vocabulary"),
    [(0, 4, 7), (1, 1, 1), (3, 1, 2), (5, 17, 1)],
    ids=["no rows", "one element", "two words", "one word"],
)
def test_edge_shapes(device: str, way: str, rows: int, size: int, vocabulary: int) -> None:
    hidden, weight, targets = made(device, rows, size, vocabulary, avoid=())
    row_weights = torch.rand(rows, device=device)
    nll = linear_cross_entropy(hidden, weight, targets, impl="fused")
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl="fused")
    wanted = row_by_row(hidden, weight, targets) + 0 * weight.sum()
    torch.testing.assert_close(nll, wanted, **CLOSE)
    for result, true in ((nll.sum(), wanted.sum()), (loss, (wanted * row_weights).sum())):
        got = torch.autograd.grad(result, (hidden, weight), retain_graph=True)
        if rows > 0:
            true_grads = torch.autograd.grad(true, (hidden, weight), retain_graph=True)
            torch.testing.assert_close(got, true_grads, **CLOSE)
        assert rows > 0 or not any(grad.any() for grad in got)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs(device: str, way: str, frozen: str) -> None:
    hidden, weight, targets = made(device)
    both = [hidden, weight]
    wanted = row_by_row(hidden, weight, targets)
    want = torch.autograd.grad(wanted.sum(), both)
    inputs = [
        t.detach() if frozen in (name, "both") else t
        for name, t in zip(["hidden", "weight"], both, strict=True)
    ]
    nll = linear_cross_entropy(*inputs, targets, impl="fused")
    torch.testing.assert_close(nll, wanted, **CLOSE)
    assert nll.requires_grad == (frozen != "both")
    for t, w in zip(inputs, want, strict=True):
        if t.requires_grad:
            (grad,) = torch.autograd.grad(nll.sum(), t, retain_graph=True)
            torch.testing.assert_close(grad, w, **CLOSE)


@pytest.mark.parametrize("nothing", ["ignored", "weightless"])
def test_all_rows_without_loss(device: str, way: str, nothing: str) -> None:
    hidden, weight, targets = made(device)
    row_weights = torch.zeros(len(targets), device=device)
    if nothing == "ignored":
        targets[:] = -100
        row_weights += 1
    loss, nll = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl="fused")
    assert loss == 0
    assert not nll.any()
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("accumulate", ["auto", "float32", "parameter"])
@pytest.mark.parametrize("function", ["rows", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget(
    device: str,
    way: str,
    dtype: torch.dtype,
    function: str,
    accumulate: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our error against the fp64 truth is within that of F.cross_entropy in the same dtype; in several
    chunks (of 28 rows), strided inputs."""
    monkeypatch.setattr(cuda, "ROW_UNIT", 4)
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 30 * (320 + 32) * dtype.itemsize)
    hidden, weight, targets = made(device, 90, 32, 301, dtype=dtype)
    row_weights = torch.rand(90, device=device) / 90

    def torch_own(h: Tensor, w: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        nll = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="none")
        return nll, torch.autograd.grad((nll * row_weights).sum(), (h, w))

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        options: dict[str, Any] = {"accumulate": accumulate, "impl": "fused"}
        if function == "sum":
            loss, nll = linear_cross_entropy_sum(h, w, targets, row_weights, **options)
            return nll, torch.autograd.grad(loss, (h, w))
        nll = linear_cross_entropy(h, w, targets, **options)
        return nll, torch.autograd.grad((nll * row_weights).sum(), (h, w))

    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    strided = hidden.detach().T.contiguous().T.requires_grad_()
    results = [torch_own(*exact), ours(strided, weight), torch_own(hidden, weight)]
    truth, got, theirs = ([nll, *grads] for nll, grads in results)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == got[2].dtype == dtype
    unit = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for name, t, a, b in zip(["nll", "hidden", "weight"], truth, got, theirs, strict=True):
        error, budget = (a - t).abs().max(), (b - t).abs().max()
        assert error <= budget + unit * t.abs().max(), f"{name}: {error:.3g} > {budget:.3g}"


def test_sums_in_float32_round_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 over 32 chunks: summed in fp32 the error is that of one chunk, otherwise it grows."""
    monkeypatch.setattr(cuda, "ROW_UNIT", 1)
    hidden, weight, targets = made(device, 96, 16, 40, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (truth,) = torch.autograd.grad(row_by_row(*exact, targets).sum(), exact[1])

    def error(rows: int, accumulate: str) -> float:
        monkeypatch.setattr(cuda, "WORKSPACE_BYTES", rows * (64 + 16) * 2)
        nll = linear_cross_entropy(hidden, weight, targets, accumulate=accumulate, impl="fused")
        (grad,) = torch.autograd.grad(nll.sum(), weight)
        return float((grad.double() - truth).norm() / truth.norm())

    at_once, wide, narrow = error(96, "parameter"), error(3, "float32"), error(3, "parameter")
    assert wide < 1.2 * at_once
    assert narrow > 1.2 * at_once
    assert narrow < 10 * at_once


def test_small_row_weights_survive_float16(device: str) -> None:
    hidden, weight, targets = made(device, 40, 16, 50, dtype=torch.float16)
    row_weights = torch.full((40,), 1e-7, device=device)
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl="fused")
    got = torch.autograd.grad(loss * 2**20, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = torch.autograd.grad((row_by_row(*exact, targets) * row_weights).sum() * 2**20, exact)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-3 * float(b.abs().max()))


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
                    return getattr(chunks, name.split("linear_cross_entropy_")[1])(*args)
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
@pytest.mark.parametrize("accumulate", ["auto", "parameter"])
def test_workspace(
    device: str, dtype: torch.dtype, kind: str, accumulate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks and copies stay within the workspace; rows that take no part cost no product."""
    workspace = 200_000
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(cuda, "ROW_UNIT", 16)
    take("capturing" if kind == "capturing" else "waiting", monkeypatch)
    hidden, weight, targets = (t.detach() for t in made(device, 400, 20, 1000, dtype=dtype))
    live = torch.ones(400, dtype=torch.bool, device=device)
    if kind == "half of them":
        live[torch.randperm(400)[:208]] = False
    softmax = SoftmaxCrossEntropy(hidden, None, 1.0, None, 1.0)
    with Watch(hidden, weight, targets) as watch:
        results = cuda.run(
            *(hidden, weight, targets, torch.ones(400, device=device), live, softmax),
            *(True, True, accumulate),
        )
    wide = dtype == torch.float16 or (dtype == torch.bfloat16 and accumulate == "auto")
    if device == "cuda" or not wide:  # (on the CPU 16-bit operands of an fp32 product are copied)
        assert watch.most <= workspace + sum(r.nbytes for r in results) + 400 * 40
    rows = [m for m, k, n in watch.products if (k, n) == (20, 1000)]
    assert len(rows) > 1
    assert sum(rows) == {"all rows": 400, "half of them": 192, "capturing": 400}[kind]


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_in_place(device: str, dtype: torch.dtype) -> None:
    for count, offset in ((0, 0), (1, 1), (5, 3), (3000, 0), (4097, 5)):
        memory = torch.full((count + offset + 9,), torch.nan, dtype=dtype, device=device)
        tensor = memory[offset : offset + count].copy_(torch.randn(count))
        for factor in (0.37, 1.0):
            wanted = (tensor.float() * torch.tensor(factor, device=device)).to(dtype)
            scale_(tensor, torch.tensor(factor, device=device))
            assert torch.equal(tensor, wanted)
        assert memory.isnan().sum() == offset + 9


@pytest.mark.parametrize("banned", [None, [1, 4]], ids=["all", "banned"])
def test_opcheck(device: str, banned: list[int] | None) -> None:
    hidden, weight, targets = (t.detach() for t in made(device))
    grad = torch.rand(len(targets), device=device)
    units = torch.rand_like(hidden), torch.rand_like(weight)
    ids = None if banned is None else torch.tensor(banned, device=device)
    options = (ids, 0.7, -100, 3.0, 1.5)
    ops = torch.ops.quietstar
    torch.library.opcheck(ops.linear_cross_entropy_forward, (hidden, weight, targets, *options))
    for wanted in [(True, True, "auto"), (False, True, "parameter")]:
        units = tuple(u if want else u.new_empty(0) for u, want in zip(units, wanted[:2], strict=True))
        torch.library.opcheck(
            ops.linear_cross_entropy_backward, (grad, hidden, weight, targets, *units, *options, *wanted)
        )
    torch.library.opcheck(
        ops.linear_cross_entropy_forward_and_backward,
        (hidden, weight, targets, grad, *options, True, True, True, "float32"),
    )


@pytest.mark.parametrize("function", ["rows", "sum"])
def test_compiles_as_one_graph(device: str, function: str) -> None:
    torch.compiler.reset()
    hidden, weight, targets = made(device)
    row_weights = torch.rand(len(targets), device=device)
    options = {"temperature": 0.7, "softcap": 3.0, "accumulate": "parameter", "impl": "fused"}

    def call(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if function == "sum":
            return linear_cross_entropy_sum(h, w, targets, row_weights, **options)
        nll = linear_cross_entropy(h, w, targets, **options)
        return (nll * row_weights).sum(), nll

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(hidden, weight)
    wanted = call(hidden, weight)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got[0], (hidden, weight)),
        torch.autograd.grad(wanted[0], (hidden, weight)),
    )


@pytest.mark.cuda_on_cpu
def test_bad_arguments_of_the_kernel(cuda_on_cpu: ModuleType) -> None:
    def call(words: int = 4, stride: int = 4, temperature: float = 1.0, softcap: float = 0.0) -> None:
        pointers = (0, 0, 0)
        cuda_on_cpu.cuda_softmax_cross_entropy(
            *(0, 0, 1, words, stride, *pointers, temperature, softcap, 1.0, 0, 0, 0, 0)
        )

    with pytest.raises(ValueError, match="words is 0; expected 1 to"):
        call(words=0)
    with pytest.raises(ValueError, match="row_stride is 3; expected at least 4"):
        call(stride=3)
    with pytest.raises(ValueError, match="temperature is 0"):
        call(temperature=0)
    with pytest.raises(ValueError, match="softcap is -1"):
        call(softcap=-1)
    hidden, weight, targets = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="accumulate is 'float16'; expected one of auto, float32"):
        linear_cross_entropy(hidden, weight, targets, accumulate="float16")
    cuda_on_cpu.fail_launch(0)
    with pytest.raises(RuntimeError, match="injected launch failure"):
        linear_cross_entropy(hidden, weight, targets, impl="fused")

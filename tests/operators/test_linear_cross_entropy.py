"""linear_cross_entropy and its sum against softmax probabilities written out row by row."""

from __future__ import annotations

import importlib

import pytest
import torch
from linear_cross_entropy_cases import OPTIONS, Watch, make, row_by_row

from quietstar_ext.linear_cross_entropy import cpu as chunks
from quietstar_ext.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from quietstar_ext.linear_cross_entropy.call import Products
from quietstar_ext.linear_cross_entropy.softmax import SoftmaxCrossEntropy

# The package exports functions of this module's name, so the module is found by its path.
module = importlib.import_module("quietstar_ext.linear_cross_entropy.api")

# "chunks" is the fused path with its in-place step in PyTorch, at three sizes of the workspace (in
# rows of fp64 logits over 13 words). The kernel joins as "fused", with fp32 inputs.
IMPLS = ["reference", "chunks", "chunks of 3 rows", "chunks of 1 row", "fused"]
WORKSPACE = {"chunks of 3 rows": 3 * 13 * 8 * 5, "chunks of 1 row": 0}
DTYPE = dict.fromkeys(IMPLS, torch.float64) | {"fused": torch.float32}
TOLERANCE = dict.fromkeys(IMPLS, 1e-12) | {"fused": 2e-5}


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """Which implementation a test is about."""
    if request.param.startswith("chunks"):
        monkeypatch.setattr(module, "_fused_unsupported_reason", lambda *tensors: None)
    if request.param in WORKSPACE:
        monkeypatch.setattr(chunks, "WORKSPACE_BYTES", WORKSPACE[request.param])
    return request.param


def run_as(impl):
    return "reference" if impl == "reference" else "fused"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_row_by_row(impl, options):
    hidden, weight, targets = make(dtype=DTYPE[impl])
    nll = linear_cross_entropy(hidden, weight, targets, **options, impl=run_as(impl))
    wanted = row_by_row(hidden, weight, targets, **options)
    close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
    torch.testing.assert_close(nll, wanted, **close)
    assert nll[1] == 0
    grad = torch.randn_like(nll)
    grad[4] = 0
    got = torch.autograd.grad(nll, (hidden, weight), grad)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, (hidden, weight), grad), **close)
    assert not got[0][[1, 4]].any()


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "keep"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_sum_equals_row_by_row(impl, options, skip):
    hidden, weight, targets = make(dtype=DTYPE[impl])
    row_weights = torch.randn(len(targets), dtype=DTYPE[impl])
    row_weights[[3, 6]] = 0
    loss, nll = linear_cross_entropy_sum(
        hidden,
        weight,
        targets,
        row_weights,
        **options,
        skip_zero_weight=skip,
        impl=run_as(impl),
    )
    wanted = row_by_row(hidden, weight, targets, **options)
    wanted_loss = (wanted * row_weights).sum()
    close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
    torch.testing.assert_close(loss, wanted_loss, **close)
    assert loss.shape == ()
    assert not nll.requires_grad
    shown = torch.where((row_weights == 0) & skip, 0, wanted)
    torch.testing.assert_close(nll, shown.detach(), **close)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(3 * wanted_loss, (hidden, weight)), **close)
    assert not got[0][[1, 3, 6]].any()


def test_equals_torch_cross_entropy(impl):
    hidden, weight, targets = make(rows=50, vocabulary=97, dtype=DTYPE[impl])
    targets[1:20] = 7
    nll = linear_cross_entropy(hidden, weight, targets, ignore_index=7, impl=run_as(impl))
    wanted = torch.nn.functional.cross_entropy(
        hidden @ weight.T, targets, ignore_index=7, reduction="none"
    )
    torch.testing.assert_close(nll, wanted, rtol=TOLERANCE[impl], atol=TOLERANCE[impl])


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs(impl, frozen):
    hidden, weight, targets = make(dtype=DTYPE[impl])
    row_weights = torch.rand(len(targets), dtype=DTYPE[impl])
    both = [hidden, weight]
    wanted = row_by_row(hidden, weight, targets)
    want = torch.autograd.grad((wanted * row_weights).sum(), both)
    inputs = [
        t.detach() if frozen in (name, "both") else t
        for name, t in zip(["hidden", "weight"], both, strict=True)
    ]
    nll = linear_cross_entropy(*inputs, targets, impl=run_as(impl))
    loss, _ = linear_cross_entropy_sum(*inputs, targets, row_weights, impl=run_as(impl))
    for result in ((nll * row_weights).sum(), loss):
        assert result.requires_grad == (frozen != "both")
        for t, w in zip(inputs, want, strict=True):
            if t.requires_grad:
                (grad,) = torch.autograd.grad(result, t, retain_graph=True)
                close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
                torch.testing.assert_close(grad, w, **close)


def test_ignored_rows_may_hold_anything(impl):
    hidden, weight, targets = make(dtype=DTYPE[impl])
    with torch.no_grad():
        hidden[1] = torch.inf
    row_weights = torch.ones(len(targets), dtype=DTYPE[impl])
    nll = linear_cross_entropy(hidden, weight, targets, impl=run_as(impl))
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl=run_as(impl))
    for result in (nll.sum(), loss):
        grads = torch.autograd.grad(result, (hidden, weight))
        assert result.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][1].any()


def test_a_banned_target_has_infinite_loss(impl):
    """Its gradient is that of the log-sum-exp alone; the other rows are not disturbed."""
    hidden, weight, targets = make(dtype=DTYPE[impl])
    targets[2] = 5
    options = {"banned": torch.tensor([5]), "impl": run_as(impl)}
    nll = linear_cross_entropy(hidden, weight, targets, **options)
    assert nll[2] == torch.inf
    assert nll[torch.arange(len(nll)) != 2].isfinite().all()
    grads = torch.autograd.grad(nll, (hidden, weight), torch.ones_like(nll))
    keep = [v for v in range(len(weight)) if v != 5]
    partition = torch.logsumexp(hidden[2] @ weight[keep].T, 0)
    (wanted,) = torch.autograd.grad(partition, hidden)
    torch.testing.assert_close(grads[0][2], wanted[2], rtol=TOLERANCE[impl], atol=TOLERANCE[impl])
    assert grads[1].isfinite().all()


def test_large_logits(impl):
    hidden, weight, targets = make(dtype=DTYPE[impl])
    nll = linear_cross_entropy(hidden * 1e4, weight, targets, impl=run_as(impl))
    torch.testing.assert_close(nll, row_by_row(hidden * 1e4, weight, targets), rtol=1e-5, atol=1e-1)
    assert all(g.isfinite().all() for g in torch.autograd.grad(nll.sum(), (hidden, weight)))


@pytest.mark.parametrize(
    ("rows", "size", "vocabulary"),
    [(0, 4, 7), (1, 1, 1), (3, 1, 2), (5, 17, 1)],
    ids=["no rows", "one element", "two words", "one word"],
)
def test_edge_shapes(impl, rows, size, vocabulary):
    hidden, weight, targets = make(rows, size, vocabulary, DTYPE[impl], avoid=())
    row_weights = torch.rand(rows, dtype=DTYPE[impl])
    nll = linear_cross_entropy(hidden, weight, targets, impl=run_as(impl))
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl=run_as(impl))
    assert nll.shape == (rows,)
    close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
    torch.testing.assert_close(nll, row_by_row(hidden, weight, targets), **close)
    torch.testing.assert_close(loss, (nll * row_weights).sum(), **close)
    for result in (nll.sum(), loss):
        shapes = [grad.shape for grad in torch.autograd.grad(result, (hidden, weight))]
        assert shapes == [hidden.shape, weight.shape]


@pytest.mark.parametrize("nothing", ["ignored", "weightless"])
def test_all_rows_without_loss(impl, nothing):
    hidden, weight, targets = make(dtype=DTYPE[impl])
    row_weights = torch.zeros(len(targets), dtype=DTYPE[impl])
    if nothing == "ignored":
        targets[:] = -100
        row_weights += 1
    loss, nll = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl=run_as(impl))
    assert loss == 0
    assert not nll.any()
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_strided_inputs(impl):
    hidden, weight, targets = make(dtype=DTYPE[impl])
    strided = hidden.detach().T.contiguous().T.requires_grad_()
    tied = torch.stack([weight.detach()] * 2, 1)[:, 1].requires_grad_()
    apart = torch.stack([targets, targets + 99], 1)[:, 0]
    nll = linear_cross_entropy(strided, tied, apart, impl=run_as(impl))
    wanted = linear_cross_entropy(hidden, weight, targets, impl=run_as(impl))
    close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
    torch.testing.assert_close(nll, wanted, **close)
    torch.testing.assert_close(
        torch.autograd.grad(nll.sum(), (strided, tied)),
        torch.autograd.grad(wanted.sum(), (hidden, weight)),
        **close,
    )


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "all"])
def test_gradcheck(impl, options):
    if DTYPE[impl] != torch.float64:
        pytest.skip("the kernel is checked against the fp64 reference instead")
    hidden, weight, targets = make(rows=5, size=3)
    row_weights = torch.randn(5, dtype=torch.float64)

    def call(h, w):
        return linear_cross_entropy(h, w, targets, **options, impl=run_as(impl))

    def call_sum(h, w):
        return linear_cross_entropy_sum(h, w, targets, row_weights, **options, impl=run_as(impl))[0]

    assert torch.autograd.gradcheck(call, (hidden, weight))
    assert torch.autograd.gradcheck(call_sum, (hidden, weight))


@pytest.mark.parametrize("function", ["rows", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_budget(impl, dtype, function, monkeypatch):
    """Our error against the fp64 truth is within that of F.cross_entropy in the same dtype."""
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 7 * 301 * 6)
    hidden, weight, targets = make(90, 32, 301, dtype)
    row_weights = torch.rand(90) / 90

    def torch_own(h, w):
        nll = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="none")
        return nll, torch.autograd.grad((nll * row_weights).sum(), (h, w))

    def ours(h, w):
        if function == "sum":
            loss, nll = linear_cross_entropy_sum(h, w, targets, row_weights, impl=run_as(impl))
            return nll, torch.autograd.grad(loss, (h, w))
        nll = linear_cross_entropy(h, w, targets, impl=run_as(impl))
        return nll, torch.autograd.grad((nll * row_weights).sum(), (h, w))

    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    results = [torch_own(*exact), ours(hidden, weight), torch_own(hidden, weight)]
    truth, got, theirs = ([nll, *grads] for nll, grads in results)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == got[2].dtype == dtype
    # In fp32 both are sums in some order, so neither is the better one.
    unit = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for name, t, a, b in zip(["nll", "hidden", "weight"], truth, got, theirs, strict=True):
        error, budget = (a - t).abs().max(), (b - t).abs().max()
        assert error <= budget + unit * t.abs().max(), f"{name}: {error:.3g} > {budget:.3g}"


def test_small_row_weights_survive_float16(impl):
    """A loss scale that comes in the backward pass finds the gradients of 1/count still there."""
    hidden, weight, targets = make(40, 16, 50, torch.float16)
    row_weights = torch.full((40,), 1e-7)
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl=run_as(impl))
    got = torch.autograd.grad(loss * 2**20, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = torch.autograd.grad((row_by_row(*exact, targets) * row_weights).sum() * 2**20, exact)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-3 * float(b.abs().max()))


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [4, 84])
def test_chunks_skip_rows_and_keep_to_the_workspace(dtype, softcap, width, monkeypatch):
    workspace = 200_000
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace)
    hidden, weight, targets = (t.detach() for t in make(400, width, 1000, dtype))
    live = torch.zeros(400, dtype=torch.bool)
    live[2 + torch.randperm(398)[:192]] = True
    softmax = SoftmaxCrossEntropy(hidden, None, 1.0, softcap, 1.0)
    assert softmax.fused
    with Watch(hidden, weight, targets) as watch:
        call = Products(hidden, weight, targets, torch.ones(400), live, softmax, True, True)
        results = chunks.run(call)
    # Besides the results, some numbers per row.
    assert watch.most <= workspace + sum(r.nbytes for r in results) + 400 * 40
    # Products m x k x n: the logits of live rows alone, and the gradient of their hidden states. (The
    # chunks have a multiple of 16 rows, which tells them from the width.)
    assert sum(n for m, k, n in watch.products if (m, k) == (1000, width)) == 192
    assert sum(m for m, k, n in watch.products if (k, n) == (1000, width)) == 192


@pytest.mark.parametrize("banned", [None, torch.tensor([1, 4])], ids=["all", "banned"])
def test_opcheck(banned):
    hidden, weight, targets = (t.detach() for t in make(dtype=torch.float32))
    grad = torch.rand(len(targets))
    units = torch.rand_like(hidden), torch.rand_like(weight)
    options = (banned, 0.7, -100, 3.0, 1.5)
    ops = torch.ops.quietstar
    torch.library.opcheck(ops.linear_cross_entropy_forward, (hidden, weight, targets, *options))
    for wanted in [(True, True), (False, True)]:
        units = tuple(u if want else u.new_empty(0) for u, want in zip(units, wanted, strict=True))
        torch.library.opcheck(
            ops.linear_cross_entropy_backward, (hidden, weight, targets, *options, grad, *units, *wanted)
        )
    torch.library.opcheck(
        ops.linear_cross_entropy_forward_and_backward,
        (hidden, weight, targets, *options, grad, True, True, True),
    )


def test_autocast(impl):
    hidden, weight, targets = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        nll = linear_cross_entropy(hidden.bfloat16(), weight, targets, impl=run_as(impl))
    wanted = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, impl=run_as(impl))
    assert nll.dtype == torch.float32
    assert torch.equal(nll, wanted)
    assert torch.autograd.grad(nll.sum(), weight)[0].dtype == torch.float32


@pytest.mark.parametrize("function", ["rows", "sum"])
def test_compiles_as_one_graph(impl, function):
    torch.compiler.reset()
    hidden, weight, targets = make(dtype=DTYPE[impl])
    row_weights = torch.rand(len(targets), dtype=DTYPE[impl])
    options = OPTIONS["everything"] | {"impl": run_as(impl)}

    def call(h, w):
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


def test_asking_for_a_kernel_that_is_not_there():
    hidden, weight, targets = make()
    with pytest.raises(RuntimeError, match="linear_cross_entropy: impl='fused' cannot.*not float64"):
        linear_cross_entropy(hidden, weight, targets, impl="fused")
    with pytest.raises(RuntimeError, match="linear_cross_entropy_sum: impl='fused' cannot"):
        linear_cross_entropy_sum(hidden, weight, targets, targets.double(), impl="fused")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 11, 6)}, r"hidden has shape .*; expected \[rows, d\]"),
        ({"hidden": torch.zeros(11, 6).long()}, "hidden has dtype int64"),
        ({"weight": torch.zeros(13, 7)}, r"weight has shape \[13, 7\]; expected \[V, 6\]"),
        ({"weight": torch.zeros(13, 6).half()}, "weight has dtype float16; expected float32"),
        ({"weight": torch.zeros(0, 6)}, "weight has no rows"),
        ({"weight": torch.zeros(13, 6, device="meta")}, "weight is on meta; expected cpu"),
        ({"targets": torch.zeros(10).long()}, r"targets has shape \[10\]; expected \[11\]"),
        ({"targets": torch.zeros(11).int()}, "targets has dtype int32; expected int64"),
        ({"targets": torch.full((11,), 13)}, "targets contains 13; expected values from 0 to 12"),
        ({"targets": torch.full((11,), -1)}, "targets contains -1; .* or -100"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a number greater than 0"),
        ({"softcap": -3.0}, "softcap is -3.0"),
        ({"banned": [13]}, "banned contains 13; expected values from 0 to 12"),
        ({"banned": torch.zeros(2, 2).long()}, "banned has shape"),
        ({"banned": torch.zeros(2)}, "banned has dtype float32; expected int64"),
        ({"row_weights": torch.ones(12)}, r"row_weights has shape \[12\]; expected \[11\]"),
        ({"row_weights": torch.ones(11).long()}, "row_weights has dtype int64"),
        ({"accumulate": "float16"}, "accumulate is 'float16'; expected one of auto, float32"),
        ({"impl": "kernel"}, "impl is 'kernel'"),
    ],
)
def test_errors(changes, message):
    hidden, weight, targets = make(dtype=torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | changes
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_sum(**{"row_weights": torch.ones(11)} | arguments)
    if "row_weights" not in changes:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**arguments)


def test_no_tensor():
    hidden, weight, targets = make()
    with pytest.raises(TypeError, match=r"targets is a list; expected a torch\.Tensor"):
        linear_cross_entropy(hidden, weight, targets.tolist())

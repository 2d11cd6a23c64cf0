"""linear_cross_entropy and its sum against softmax probabilities written out row by row."""

from __future__ import annotations

import pytest
import torch
from linear_cross_entropy_cases import (
    CHUNKS,
    CHUNKS_OF,
    OPTIONS,
    PLACES,
    REFERENCE,
    Watch,
    made,
    make,
    row_by_row,
)
from places import place_fixture

from quietstar_ext.linear_cross_entropy import cpu as chunks
from quietstar_ext.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from quietstar_ext.linear_cross_entropy.call import Products
from quietstar_ext.linear_cross_entropy.softmax import SoftmaxCrossEntropy

place = place_fixture(PLACES)
exact_place = place_fixture((REFERENCE, CHUNKS, *CHUNKS_OF))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_row_by_row(place, options):
    hidden, weight, targets = made(place)
    nll = linear_cross_entropy(hidden, weight, targets, **options, impl=place.impl)
    wanted = row_by_row(hidden, weight, targets, **options)
    torch.testing.assert_close(nll, wanted, **place.close)
    assert nll[1] == 0
    grad = torch.randn_like(nll)
    grad[4] = 0
    got = torch.autograd.grad(nll, (hidden, weight), grad)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, (hidden, weight), grad), **place.close)
    assert not got[0][[1, 4]].any()


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "keep"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_sum_equals_row_by_row(place, options, skip):
    hidden, weight, targets = made(place)
    row_weights = torch.randn(len(targets), dtype=place.dtype).to(place.device)
    row_weights[[3, 6]] = 0
    loss, nll = linear_cross_entropy_sum(
        *(hidden, weight, targets, row_weights), **options, skip_zero_weight=skip, impl=place.impl
    )
    wanted = row_by_row(hidden, weight, targets, **options)
    wanted_loss = (wanted * row_weights).sum()
    torch.testing.assert_close(loss, wanted_loss, **place.close)
    assert loss.shape == ()
    assert not nll.requires_grad
    shown = torch.where((row_weights == 0) & skip, 0, wanted)
    torch.testing.assert_close(nll, shown.detach(), **place.close)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    want = torch.autograd.grad(3 * wanted_loss, (hidden, weight))
    torch.testing.assert_close(got, want, **place.close)
    assert not got[0][[1, 3, 6]].any()


def test_equals_torch_cross_entropy(place):
    hidden, weight, targets = made(place, 50, 6, 97)
    targets[1:20] = 7
    nll = linear_cross_entropy(hidden, weight, targets, ignore_index=7, impl=place.impl)
    wanted = torch.nn.functional.cross_entropy(
        hidden @ weight.T, targets, ignore_index=7, reduction="none"
    )
    torch.testing.assert_close(nll, wanted, **place.close)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_ignored_rows_may_hold_anything(place, poison):
    hidden, weight, targets = made(place)
    with torch.no_grad():
        hidden[1] = poison
    row_weights = torch.ones(len(targets), dtype=place.dtype, device=place.device)
    clean = hidden.detach().nan_to_num(0, 0, 0).requires_grad_()
    nll = linear_cross_entropy(hidden, weight, targets, impl=place.impl)
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl=place.impl)
    wanted = row_by_row(clean, weight, targets)
    want = torch.autograd.grad(wanted.sum(), (clean, weight))
    torch.testing.assert_close(nll, wanted, **place.close)
    for result in (nll.sum(), loss):
        grads = torch.autograd.grad(result, (hidden, weight))
        torch.testing.assert_close(grads, want, **place.close)
        assert not grads[0][1].any()


def test_a_banned_target_has_infinite_loss(place):
    """Its gradient is that of the log-sum-exp alone; the other rows are not disturbed."""
    hidden, weight, targets = made(place)
    targets[2] = 5
    banned = torch.tensor([5], device=place.device)
    nll = linear_cross_entropy(hidden, weight, targets, banned=banned, impl=place.impl)
    assert nll[2] == torch.inf
    assert nll[torch.arange(len(nll)) != 2].isfinite().all()
    grads = torch.autograd.grad(nll, (hidden, weight), torch.ones_like(nll))
    keep = [v for v in range(len(weight)) if v != 5]
    partition = torch.logsumexp(hidden[2] @ weight[keep].T, 0)
    (wanted,) = torch.autograd.grad(partition, hidden)
    torch.testing.assert_close(grads[0][2], wanted[2], **place.close)
    assert grads[1].isfinite().all()


def test_large_logits(place):
    hidden, weight, targets = made(place)
    nll = linear_cross_entropy(hidden * 1e4, weight, targets, impl=place.impl)
    torch.testing.assert_close(nll, row_by_row(hidden * 1e4, weight, targets), rtol=1e-5, atol=1e-1)
    assert all(g.isfinite().all() for g in torch.autograd.grad(nll.sum(), (hidden, weight)))


@pytest.mark.parametrize(
    ("rows", "size", "vocabulary"),
    [(0, 4, 7), (1, 1, 1), (3, 1, 2), (5, 17, 1)],
    ids=["no rows", "one element", "two words", "one word"],
)
def test_edge_shapes(place, rows, size, vocabulary):
    hidden, weight, targets = made(place, rows, size, vocabulary, avoid=())
    row_weights = torch.rand(rows, dtype=place.dtype).to(place.device)
    nll = linear_cross_entropy(hidden, weight, targets, impl=place.impl)
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl=place.impl)
    assert nll.shape == (rows,)
    wanted = row_by_row(hidden, weight, targets) + 0 * weight.sum()
    torch.testing.assert_close(nll, wanted, **place.close)
    for result, true in ((nll.sum(), wanted.sum()), (loss, (wanted * row_weights).sum())):
        torch.testing.assert_close(result, true, **place.close)
        got = torch.autograd.grad(result, (hidden, weight), retain_graph=True)
        want = torch.autograd.grad(
            true, (hidden, weight), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(got, want, **place.close)


@pytest.mark.parametrize("nothing", ["ignored", "weightless"])
def test_all_rows_without_loss(place, nothing):
    hidden, weight, targets = made(place)
    row_weights = torch.zeros(len(targets), dtype=place.dtype, device=place.device)
    if nothing == "ignored":
        targets[:] = -100
        row_weights += 1
    loss, nll = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl=place.impl)
    assert loss == 0
    assert not nll.any()
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "all"])
def test_gradcheck(exact_place, options):
    hidden, weight, targets = make(rows=5, size=3)
    row_weights = torch.randn(5, dtype=torch.float64)
    options = options | {"impl": exact_place.impl}

    def call(h, w):
        return linear_cross_entropy(h, w, targets, **options)

    def call_sum(h, w):
        return linear_cross_entropy_sum(h, w, targets, row_weights, **options)[0]

    assert torch.autograd.gradcheck(call, (hidden, weight))
    assert torch.autograd.gradcheck(call_sum, (hidden, weight))


def test_small_row_weights_survive_float16(place):
    """A loss scale that comes in the backward pass finds the gradients of 1/count still there."""
    hidden, weight, targets = made(place, 40, 16, 50, dtype=torch.float16)
    row_weights = torch.full((40,), 1e-7, device=place.device)
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl=place.impl)
    got = torch.autograd.grad(loss * 2**20, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = torch.autograd.grad((row_by_row(*exact, targets) * row_weights).sum() * 2**20, exact)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-3 * float(b.abs().max()))


@pytest.mark.parametrize("function", ["rows", "sum"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "differing"])
def test_a_second_backward_pass(place, function, equal):
    """The first takes the gradients along and may scale them in place; the second has them again."""
    hidden, weight, targets = made(place, dtype=torch.float32)
    grad = (torch.full((11,), 0.5) if equal else torch.rand(11)).to(place.device)
    if function == "rows":
        result, grad = linear_cross_entropy(hidden, weight, targets, impl=place.impl), grad
    else:
        result, _ = linear_cross_entropy_sum(hidden, weight, targets, grad, impl=place.impl)
        grad = torch.tensor(1.0 if equal else 3.0, device=place.device)
    first = torch.autograd.grad(result, (hidden, weight), grad, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(result, (hidden, weight), 2 * grad)
    torch.testing.assert_close(list(first), copies, rtol=0, atol=0)
    torch.testing.assert_close(second, tuple(2 * g for g in copies))


def test_gradients_become_the_leaves_own(place):
    """Handed over, not copied: accumulating into .grad must not reach anything that is still used."""
    hidden, weight, targets = made(place, dtype=torch.float32)
    ones = torch.ones(11, device=place.device)
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, ones, impl=place.impl)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


# ---- the chunks of the CPU


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [4, 84])
def test_chunks_skip_rows_and_keep_to_the_workspace(dtype, softcap, width, monkeypatch):
    workspace = 200_000
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(chunks, "LARGE_WORKSPACE_BYTES", workspace)
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


# Bytes of the large workspace, and what fits it: all logits; the fp32 sum and some of them; neither.
LARGE = {"at once": 130_000, "sum": 2 * 301 * 32 * 4, "second pass": 301 * 32 * 4}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("function", ["rows", "sum"])
def test_where_the_sum_of_the_weights_gradient_does_not_fit(function, case, monkeypatch):
    """bfloat16 has a larger workspace then, and in the end a second pass through the vocabulary."""
    hidden, weight, targets = make(90, 32, 301, torch.bfloat16)
    row_weights = torch.rand(90)

    def run():
        if function == "sum":
            result, _ = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl="fused")
        else:
            nll = linear_cross_entropy(hidden, weight, targets, impl="fused")
            result = (nll * row_weights).sum()
        return torch.autograd.grad(result, (hidden, weight))

    wanted = run()
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 301 * 32 * 4 + 20_000)
    monkeypatch.setattr(chunks, "LARGE_WORKSPACE_BYTES", LARGE[case])
    made = []

    class Noted(chunks._Chunks):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr(chunks, "_Chunks", Noted)
    got = run()
    assert all(each.second_pass == (case == "second pass") for each in made)
    assert (len(list(made[0].rows())) == 1) == (case == "at once")
    assert all(each.block_vocab < 301 for each in made)
    call = Products(
        *(hidden.detach(), weight.detach(), targets, row_weights, targets >= 0),
        *(SoftmaxCrossEntropy(hidden, None, 1.0, None, 1.0), True, True),
    )
    with Watch(hidden, weight) as watch:
        chunks.run(call)
    # Multiplied with the vocabulary: for the loss, for hidden, for weight, and for a second pass.
    times = sum(m * k * n for m, k, n in watch.products) / (89 * 32 * 301)  # one row is ignored
    assert times == (4 if case == "second pass" else 3)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=1e-2 * float(b.abs().max()))


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
@pytest.mark.parametrize("ignored", [slice(None), slice(0, 2)], ids=["all", "some"])
def test_an_ignored_row_has_no_gradient_whatever_comes_in(scale, ignored):
    """As of a mean over no target: the loss is NaN, its gradients are those of nothing."""
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(17, 8, requires_grad=True)
    targets = torch.tensor([3, 5, 7, 9])
    targets[ignored] = -100
    for impl in ("fused", "reference"):
        nll = linear_cross_entropy(hidden, weight, targets, impl=impl)
        found = torch.autograd.grad(nll.sum(), (hidden, weight), torch.tensor(scale))
        assert not found[0][ignored].any(), impl
        assert not found[0][2:].isfinite().all() or ignored == slice(None), impl
        assert not found[1].any() or ignored != slice(None), impl

"""The kernel of linear_cross_entropy: its step between the products, and what becomes of gradients."""

from __future__ import annotations

import pytest
import torch
from linear_cross_entropy_cases import OPTIONS, make

from quietstar_ext.linear_cross_entropy import cpu as chunks
from quietstar_ext.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from quietstar_ext.linear_cross_entropy.softmax import SoftmaxCrossEntropy

SHAPES = [(1, 4, 1), (3, 5, 17), (16, 8, 64), (37, 8, 1003), (200, 16, 4100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_instruction_set(simd, options, shape, dtype):
    """The step between the products, on logits in any of the three dtypes, against fp64."""
    rows, _, vocabulary = shape
    if vocabulary < 6:
        options = {k: v for k, v in options.items() if k != "banned"}
    options = {"temperature": 1.0, "banned": None, "softcap": None, "logit_scale": 1.0} | options
    if options["banned"] is not None:
        options["banned"] = torch.tensor(options["banned"] * 2)
    logits = (torch.randn(vocabulary, rows) * 3).to(dtype).T
    targets = torch.randint(0, vocabulary, (rows,))
    targets[: rows // 2] = vocabulary - 1
    row_weights = torch.randn(rows)
    kernel = SoftmaxCrossEntropy(logits, **options)
    plain = SoftmaxCrossEntropy(logits.double(), **options)
    assert kernel.fused
    assert not plain.fused

    exact, got = logits.double(), logits.clone()
    nll, largest, total = kernel.loss(got, targets)
    assert torch.equal(got, logits)
    wanted, *rest = plain.loss(exact, targets)
    torch.testing.assert_close(nll.double(), wanted, rtol=1e-5, atol=1e-5)
    kernel.gradient_(got, targets, row_weights, largest, total)
    plain.gradient_(exact, targets, row_weights, *rest)
    eps = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), exact, rtol=eps, atol=1e-5)

    # A part of the vocabulary, given the sums over all of it.
    cut = vocabulary // 3
    part = logits.T[cut:].clone().T
    kernel.gradient_(part, targets, row_weights, largest, total, cut)
    torch.testing.assert_close(part, got[:, cut:])


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_huge_and_infinite_logits(simd, softcap):
    logits = torch.randn(50, 21)
    logits[:, 1] *= 1e30
    logits[3:40, 2] = -torch.inf
    logits[:, 4] = -3e38
    logits[:, 5] = 3e38
    targets = torch.randint(0, 3, (21,))
    options = {"banned": None, "temperature": 1.0, "softcap": softcap, "logit_scale": 1.0}
    results = []
    for x in (logits.clone().T, logits.double().T):
        step = SoftmaxCrossEntropy(x, **options)
        nll, largest, total = step.loss(x, targets)
        step.gradient_(x, targets, torch.ones(21), largest, total)
        results.append((nll.double(), x.double()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_nan_stays_in_its_row(simd):
    logits = torch.randn(90, 21)
    logits[70, 5] = torch.nan
    x = logits.T
    step = SoftmaxCrossEntropy(x, None, 1.0, None, 1.0)
    nll, *_ = step.loss(x, torch.zeros(21, dtype=torch.int64))
    assert nll.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(threads, dtype):
    logits = torch.randn(5000, 90).to(dtype).T
    targets = torch.randint(0, 5000, (90,))
    step = SoftmaxCrossEntropy(logits, torch.tensor([3, 77]), 1.0, 5.0, 1.0)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        x = logits.T.clone().T
        given = step.loss(x, targets)
        step.gradient_(x, targets, torch.ones(90), *given[1:])
        results.append((*given, x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_poisoned_memory(monkeypatch):
    """Whatever the memory of results and workspace holds, nothing of it is read."""
    hidden, weight, targets = make(40, 6, 301, torch.float32)
    row_weights = torch.rand(40)

    def run():
        loss, nll = linear_cross_entropy_sum(hidden, weight, targets, row_weights, impl="fused")
        return [loss, nll, *torch.autograd.grad(loss, (hidden, weight))]

    wanted = run()
    make_it = torch.empty

    def poisoned(*sizes, **options):
        memory = make_it(*sizes, **options)
        return memory.fill_(torch.nan if memory.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *s, **o: (
            self.new_full(*s, torch.nan, **o)
            if isinstance(s[0], tuple)
            else self.new_full(s, torch.nan, **o)
        ),
    )
    assert all(torch.equal(a, b) for a, b in zip(run(), wanted, strict=True))


@pytest.mark.parametrize("function", ["rows", "sum"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "differing"])
def test_a_second_backward_pass(function, equal):
    """The first takes the gradients along and may scale them in place; the second has them again."""
    hidden, weight, targets = make(dtype=torch.float32)
    grad = torch.full((11,), 0.5) if equal else torch.rand(11)
    if function == "rows":
        result, grad = linear_cross_entropy(hidden, weight, targets, impl="fused"), grad
    else:
        result, _ = linear_cross_entropy_sum(hidden, weight, targets, grad, impl="fused")
        grad = torch.tensor(1.0 if equal else 3.0)
    first = torch.autograd.grad(result, (hidden, weight), grad, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(result, (hidden, weight), 2 * grad)
    torch.testing.assert_close(list(first), copies, rtol=0, atol=0)
    torch.testing.assert_close(second, tuple(2 * g for g in copies))


def test_gradients_become_the_leaves_own():
    """Handed over, not copied: accumulating into .grad must not reach anything that is still used."""
    hidden, weight, targets = make(dtype=torch.float32)
    loss, _ = linear_cross_entropy_sum(hidden, weight, targets, torch.ones(11), impl="fused")
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("function", ["rows", "sum"])
def test_a_second_pass_through_the_vocabulary(function, monkeypatch):
    """bfloat16, where the fp32 sum of the weight's gradient does not fit into the workspace."""
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
    made = []

    class Noted(chunks._Chunks):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr(chunks, "_Chunks", Noted)
    got = run()
    assert all(each.second_pass and each.block_vocab < 301 for each in made)
    assert len(list(made[0].rows())) > 1
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=1e-2 * float(b.abs().max()))

"""The kernel of linear_cross_entropy: its step between the products, and what becomes of gradients."""

from __future__ import annotations

import pytest
import torch
from linear_cross_entropy_cases import OPTIONS

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

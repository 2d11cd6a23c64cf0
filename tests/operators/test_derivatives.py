"""Every operator under torch.func, in forward mode, and differentiated twice: right, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract import Operator
from operator_table import OPERATORS
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from quietstar_ext import (
    linear_cross_entropy,
    linear_cross_entropy_sum,
    linear_sample,
    sample_tokens,
)
from quietstar_ext.linear_entropy import linear_entropy_sum

ROWS, WIDTH, VOCABULARY = 6, 8, 20


def scalar_function(operator: Operator) -> tuple[Callable[..., Tensor], Tensor]:
    """A scalar function of the operator's first input, and a point."""
    torch.manual_seed(0)
    call = operator.derived() if operator.derived else operator.calls(torch.float32)[0]
    call = {k: v.detach() if isinstance(v, Tensor) else v for k, v in call.items()}
    first = next(k for k, v in call.items() if isinstance(v, Tensor) and v.ndim > 1)

    def function(x: Tensor, impl: str = "auto") -> Tensor:
        return operator.outputs(call | {first: x}, impl)[0].square().mean()

    return function, call[first]


FUNCTIONS = {o.name: scalar_function(o) for o in OPERATORS if o.plain is not None}


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_transforms_take_the_reference(operator: str):
    function, x = FUNCTIONS[operator]
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf, impl="fused"), leaf)
    torch.testing.assert_close(grad(function)(x), want, atol=1e-5, rtol=1e-4)
    both = torch.stack([x, x / 2])
    singles = torch.stack([function(x), function(x / 2)])
    torch.testing.assert_close(vmap(function)(both), singles)
    direction = torch.full_like(x, 0.1)
    change = (want * direction).sum()
    torch.testing.assert_close(jvp(function, (x,), (direction,))[1], change, atol=1e-5, rtol=1e-4)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, change, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="impl='fused' cannot be used here: torch.func"):
        grad(lambda y: function(y, impl="fused"))(x)


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_second_derivatives_are_refused_by_the_kernels(operator: str):
    function, x = FUNCTIONS[operator]
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf, impl="fused"), leaf, create_graph=True)
    # Added to a term that has second derivatives, a missing part would go unnoticed.
    penalty = first.square().sum() + leaf.square().sum()
    with pytest.raises(RuntimeError, match=f"{operator}: the kernel has no second.*impl='reference'"):
        torch.autograd.grad(penalty, leaf)


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_second_derivatives_of_the_reference(operator: str):
    function, x = FUNCTIONS[operator]
    x = x.double() if operator.startswith("linear") else x
    leaf = x.clone().requires_grad_()
    if operator.startswith("linear"):
        eye, targets = torch.eye(x.shape[1], dtype=x.dtype), torch.arange(len(x)) % x.shape[1]
        ones = torch.ones(len(x), dtype=x.dtype)
        function = {
            "linear_cross_entropy": lambda y, **i: linear_cross_entropy(y, eye, targets, **i).sum(),
            "linear_cross_entropy_sum": lambda y, **i: linear_cross_entropy_sum(
                y, eye, targets, ones, **i
            )[0],
        }[operator]
        # With the identity for a weight it is softmax's own: diag(p) - p pᵀ in every row.
        p = x.softmax(1)
        want = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        found = hessian(function)(x)
        for row in range(len(x)):
            torch.testing.assert_close(found[row, :, row], want[row])
    (first,) = torch.autograd.grad(function(leaf, impl="reference"), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert second.isfinite().all() and second.abs().max() > 0


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_one_graph_serves_a_first_derivative_with_create_graph(operator: str):
    function, x = FUNCTIONS[operator]
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf, impl="fused"), leaf)
    (got,) = torch.autograd.grad(function(leaf, impl="fused"), leaf, create_graph=True)
    assert got.equal(want)


def test_the_entropy_of_thoughts_refuses_second_derivatives():
    hidden = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    total = linear_entropy_sum(hidden, torch.eye(WIDTH), torch.ones(4))
    (first,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_entropy_sum: the kernel has no second"):
        (first.square().sum() + hidden.sum()).backward()


def test_vmap_over_targets_and_batched_gradients():
    hidden = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))
    weight, targets = torch.eye(WIDTH), torch.arange(ROWS)
    both = torch.stack([targets, targets + 1])
    found = vmap(lambda t: linear_cross_entropy(hidden, weight, t, banned=[WIDTH - 1]))(both)
    for row, t in zip(found, both, strict=True):
        torch.testing.assert_close(row, linear_cross_entropy(hidden, weight, t, banned=[WIDTH - 1]))
    leaf = hidden.requires_grad_()
    nll = linear_cross_entropy(leaf, weight, targets, impl="fused")
    with pytest.raises(RuntimeError, match="cannot be batched by vmap.*impl='reference'"):
        torch.autograd.grad(nll, leaf, torch.eye(ROWS), is_grads_batched=True)


def test_sampling_is_refused_under_vmap():
    """Every element would have the rows 0, 1, ... and so the same random numbers."""
    logits = torch.zeros(3, ROWS, VOCABULARY)
    with pytest.raises(RuntimeError, match="sample_tokens cannot be used under vmap"):
        vmap(lambda x: sample_tokens(x, seed=1)[0])(logits)
    with pytest.raises(RuntimeError, match="linear_sample cannot be used under vmap"):
        vmap(lambda x: linear_sample(x, torch.eye(VOCABULARY), seed=1)[0])(logits)

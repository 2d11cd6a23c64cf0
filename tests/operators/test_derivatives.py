"""Every operator under torch.func, in forward mode, and differentiated twice: right, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from quietstar_ext import (
    linear_cross_entropy,
    linear_cross_entropy_sum,
    linear_sample,
    mixing_head,
    sample_tokens,
    thought_attention,
)
from quietstar_ext.linear_entropy import linear_entropy_sum

ROWS, WIDTH, VOCABULARY = 6, 8, 20


def scalar_functions() -> dict[str, tuple[Callable[..., Tensor], Tensor]]:
    """For each operator a scalar function of one of its inputs, and a point."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = draw(ROWS, WIDTH), draw(VOCABULARY, WIDTH)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    shares = torch.rand(ROWS, generator=generator)
    shapes = ((WIDTH, 2 * WIDTH), (WIDTH,), (WIDTH, WIDTH), (WIDTH,), (1, WIDTH))
    head = [0.3 * draw(*shape) for shape in shapes]  # not so large that the sigmoid is flat
    thought = draw(ROWS, WIDTH)
    text, slots = draw(2, 1, 2, 5, 4), draw(2, 1, 2, 3, 5, 4)
    stop = torch.arange(1, 6, dtype=torch.int32)[None]
    start = torch.zeros_like(stop)
    return {
        "linear_cross_entropy": (
            lambda x, **impl: linear_cross_entropy(x, weight, targets, **impl).square().mean(),
            hidden,
        ),
        "linear_cross_entropy_sum": (
            lambda x, **impl: linear_cross_entropy_sum(x, weight, targets, shares, **impl)[0],
            hidden,
        ),
        "mixing_head": (
            lambda x, **impl: mixing_head(x, thought, *head, "sigmoid", **impl)[0].square().mean(),
            hidden,
        ),
        "thought_attention": (
            lambda x, **impl: (
                thought_attention(x, *text, *slots, start, stop, **impl).square().mean()  # type: ignore[union-attr]
            ),
            draw(1, 4, 3, 5, 4),
        ),
    }


FUNCTIONS = scalar_functions()


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
        function = {
            "linear_cross_entropy": lambda y, **impl: linear_cross_entropy(
                y, torch.eye(WIDTH, dtype=y.dtype), torch.arange(ROWS), **impl
            ).sum(),
            "linear_cross_entropy_sum": lambda y, **impl: linear_cross_entropy_sum(
                y, torch.eye(WIDTH, dtype=y.dtype), torch.arange(ROWS), y.new_ones(ROWS), **impl
            )[0],
        }[operator]
        # With the identity for a weight it is softmax's own: diag(p) - p pᵀ in every row.
        p = x.softmax(1)
        want = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        found = hessian(function)(x)
        for row in range(ROWS):
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

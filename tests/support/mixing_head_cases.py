"""Inputs of mixing_head that its tests share."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, relu

NAMES = ["base", "thought", "w1", "b1", "w2", "b2", "w3"]


def make(positions, rows, size, indexed, dtype=torch.float64):
    tensors = [
        torch.randn(positions, size),
        torch.randn(rows, size),
        torch.randn(size, 2 * size) / (2 * size) ** 0.5,
        torch.randn(size) / 2,
        torch.randn(size, size) / size**0.5,
        torch.randn(size) / 2,
        torch.randn(1, size) / size**0.5,
    ]
    index = torch.randint(0, positions, (rows,)) if indexed else None
    return [t.to(dtype).requires_grad_() for t in tensors], index


def make_clear_of_zero(*shape, dtype):
    """Inputs for which no ReLU stands so near to 0 that rounding could switch it."""
    while True:
        tensors, index = make(*shape, dtype=dtype)
        base, thought, w1, b1, w2, b2, _ = (t.detach().double() for t in tensors)
        first = linear(torch.cat([base if index is None else base[index], thought], 1), w1, b1)
        if min(first.abs().min(), linear(relu(first), w2, b2).abs().min()) > 2e-6:
            return tensors, index


def concatenated(tensors, activation, index):
    base, thought, w1, b1, w2, b2, w3 = tensors
    base = base if index is None else base[index]
    hidden = relu(linear(torch.cat([base, thought], 1), w1, b1))
    w = linear(relu(linear(hidden, w2, b2)), w3)
    w = torch.sigmoid(w) if activation == "sigmoid" else w
    return torch.lerp(base, thought, w.expand_as(base)), w


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs)

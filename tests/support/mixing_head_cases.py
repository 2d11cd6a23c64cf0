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


def on(device, case):
    """What ``make`` has made, as leaves on the device."""
    tensors, index = case
    there = [t.detach().to(device).requires_grad_() for t in tensors]
    return there, None if index is None else index.to(device)


def make_clear_of_zero(*shape, dtype):
    """Inputs for which no ReLU stands so near to 0 that rounding could switch it."""
    while True:
        tensors, index = make(*shape, dtype=dtype)
        base, thought, w1, b1, w2, b2, _ = (t.detach().double() for t in tensors)
        first = linear(torch.cat([base if index is None else base[index], thought], 1), w1, b1)
        if min(first.abs().min(), linear(relu(first), w2, b2).abs().min()) > 2e-6:
            return tensors, index


def make_with_large_biases(positions, rows, size, indexed, dtype):
    """They keep the arguments of relu away from 0, where the last bit of a sum, in whatever order it is
    taken, switches a whole term of the gradient on or off."""
    tensors, index = make(positions, rows, size, indexed, dtype=dtype)
    with torch.no_grad():
        tensors[4].div_(8)
        for bias in (tensors[3], tensors[5]):
            bias.copy_(6 * torch.randn(size).sign())
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

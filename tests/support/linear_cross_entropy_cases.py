"""Inputs and options of linear_cross_entropy that its tests share."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 3.0},
    "banned": {"banned": [2, 5]},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": -0.3},
    "everything": {"temperature": 0.7, "banned": [0, 3], "softcap": 3.0, "logit_scale": 1.7},
}


def make(rows=11, size=6, vocabulary=13, dtype=torch.float64, avoid=(0, 2, 3, 5)):
    hidden = torch.randn(rows, size).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size).to(dtype).requires_grad_()
    allowed = torch.tensor([v for v in range(vocabulary) if v not in avoid])
    targets = allowed[torch.randint(0, len(allowed), (rows,))]
    targets[1:2] = -100
    return hidden, weight, targets


def row_by_row(
    hidden, weight, targets, temperature=1.0, banned=(), softcap=None, logit_scale=1.0, ignore=-100
):
    losses = []
    keep = [v for v in range(len(weight)) if v not in banned]
    for h, t in zip(hidden, targets.tolist(), strict=True):
        x = torch.stack([(h * row).sum() for row in weight]) * logit_scale
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        x = x / temperature
        losses.append(
            hidden.new_zeros(()) if t == ignore else -torch.log_softmax(x[keep], 0)[keep.index(t)]
        )
    return torch.stack(losses) if losses else hidden.new_zeros(0)


class Watch(TorchDispatchMode):
    """Notes the shape of every matrix product and the most bytes alive at a time besides the inputs."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.products, self.most, self.made = [], 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.mm.out, aten.addmm_.default):
            self.products.append((*args[-2].shape, args[-1].shape[1]))
        if isinstance(out, torch.Tensor):
            self.made.append(weakref.ref(out))
        alive = [tensor for made in self.made if (tensor := made()) is not None]
        self.made = [weakref.ref(tensor) for tensor in alive]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        sizes = [size for address, size in storages.items() if address not in self.inputs]
        self.most = max(self.most, sum(sizes))
        return out

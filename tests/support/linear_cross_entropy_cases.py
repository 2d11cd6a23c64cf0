"""Inputs and options of linear_cross_entropy that its tests share."""

from __future__ import annotations

import importlib
import weakref
from dataclasses import replace

import torch
from places import CPU, CUDA, CUDA_ON_CPU, REFERENCE
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar_ext.linear_cross_entropy import cpu, cuda

# The package exports functions of this module's name, so the module is found by its path.
api = importlib.import_module("quietstar_ext.linear_cross_entropy.api")

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 3.0},
    "banned": {"banned": [2, 5]},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": -0.3},
    "everything": {"temperature": 0.7, "banned": [0, 3], "softcap": 3.0, "logit_scale": 1.7},
}

# "chunks" is the fused path with its in-place step in PyTorch, at three sizes of the workspace (in rows
# of fp64 logits over 13 words). On CUDA the rows that take part are looked up by waiting, or all rows
# are worked on, as in a capture.
CHUNKS = replace(
    REFERENCE,
    name="chunks",
    impl="fused",
    patches=((api, "_fused_unsupported_reason", lambda *tensors: None),),
)
CHUNKS_OF = [
    replace(CHUNKS, name=f"chunks of {rows}", patches=(*CHUNKS.patches, (cpu, "WORKSPACE_BYTES", size)))
    for rows, size in ((3, 3 * 13 * 8 * 5), (1, 0))
]
WAYS = {"waiting": 0, "capturing": float("inf")}
IN_CHUNKS = ((cuda, "ROW_UNIT", 4), (cuda, "WORKSPACE_BYTES", 18 * (320 + 32) * 2))
PLACES = (
    *(REFERENCE, CHUNKS, *CHUNKS_OF, CPU),
    replace(
        CPU,
        name="cpu in chunks",
        patches=tuple((cpu, f"{kind}WORKSPACE_BYTES", 7 * 301 * 6) for kind in ("", "LARGE_")),
    ),
    *(
        replace(each, name=f"{each.name} {way}", patches=((cuda, "WAIT_FOR_FLOP", flop), *IN_CHUNKS))
        for each in (CUDA_ON_CPU, CUDA)
        for way, flop in WAYS.items()
    ),
)


def make(rows=11, size=6, vocabulary=13, dtype=torch.float64, avoid=(0, 2, 3, 5)):
    hidden = torch.randn(rows, size).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size).to(dtype).requires_grad_()
    allowed = torch.tensor([v for v in range(vocabulary) if v not in avoid])
    targets = allowed[torch.randint(0, len(allowed), (rows,))]
    targets[1:2] = -100
    return hidden, weight, targets


def made(place, *sizes, dtype=None, **options):
    """Inputs on the place's device, in its dtype."""
    hidden, weight, targets = make(*sizes, dtype=dtype or place.dtype, **options)
    there = [t.detach().to(place.device).requires_grad_() for t in (hidden, weight)]
    return *there, targets.to(place.device)


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

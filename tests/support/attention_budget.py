"""Three computations of thought_attention that tests compare: ours, PyTorch's own, and the truth."""

from __future__ import annotations

import functools
from typing import Any

import torch
from attention_cases import TENSORS, gradients, make
from contract import Call, exact
from operator_table import OPERATORS
from torch import Tensor

from quietstar_ext.thought_attention import thought_attention
from quietstar_ext.thought_attention.reference import visible

NAMES = ["out", "lse", *TENSORS, "sinks"]
(ATTENTION,) = (o for o in OPERATORS if o.name == "thought_attention")


def case(shape: tuple[Any, ...], dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Random inputs on a device; options as the public function takes them."""
    tensors, start, stop, options = make(*shape, dtype=dtype)
    tensors = [t.detach().to(device).requires_grad_() for t in tensors]
    if options.pop("sinks", None) is not None:
        options["sinks"] = torch.randn(shape[1], device=device, requires_grad=True)
    return tensors, start.to(device), stop.to(device), options


def call_of(tensors: list[Tensor], start: Tensor, stop: Tensor, options: dict[str, Any]) -> Call:
    inputs = dict(zip(TENSORS, tensors, strict=True))
    return inputs | {"text_start": start, "text_stop": stop, "return_lse": True} | options


def ours(*inputs: Any) -> list[Tensor]:
    """Outputs and gradients, the same random combination of the outputs for all."""
    return ATTENTION.everything(call_of(*inputs), "fused")


def truth(*inputs: Any) -> list[Tensor]:
    return ATTENTION.everything(exact(call_of(*inputs)), "reference")


def by_torch(
    tensors: list[Tensor], start: Tensor, stop: Tensor, options: dict[str, Any]
) -> list[Tensor]:
    """What PyTorch makes of it in the dtype of the inputs: products and softmax, with a mask."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    q, k_text, v_text, k_thought, v_thought = leaves
    _, hq, sq, _, d = q.shape
    group = hq // k_text.shape[1]
    k_text, v_text, k_thought, v_thought = (
        t.repeat_interleave(group, 1) for t in (k_text, v_text, k_thought, v_thought)
    )
    scale = options.get("scale") or d**-0.5
    text = torch.einsum("bhsmd,bhnd->bhsmn", q, k_text)
    slots = torch.einsum("bhsmd,bhtmd->bhsmt", q, k_thought)
    scores = torch.cat([text, slots], -1) * scale
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    text_seen, slot_seen = visible(
        start, stop, sq, k_thought.shape[2], k_text.shape[2], options.get("sliding_window")
    )
    seen = torch.cat(
        [t[:, None].expand(*scores.shape[:-1], -1) for t in (text_seen, slot_seen[None])], -1
    )
    scores = scores.masked_fill(~seen, -torch.inf)
    extra = []
    if "sinks" in options:
        extra = [options["sinks"].detach().clone().requires_grad_()]
        sink = extra[0].to(q.dtype)[:, None, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    lse = torch.logsumexp(scores.float(), -1)
    weights = torch.nan_to_num(torch.softmax(scores, -1))
    n, sk = k_text.shape[2], k_thought.shape[2]
    out = torch.einsum("bhsmn,bhnd->bhsmd", weights[..., :n], v_text)
    out = out + torch.einsum("bhsmt,bhtmd->bhsmd", weights[..., n : n + sk], v_thought)
    found = [out.detach(), lse.detach(), *gradients((out, lse), [*leaves, *extra])]
    return [t.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) for t in found]


def assert_within_budget(
    tensors: list[Tensor], start: Tensor, stop: Tensor, options: dict[str, Any], factor: float = 2.0
) -> list[Tensor]:
    """Our error against the fp64 truth is at most PyTorch's own in this dtype, and some rounding."""
    found = ours(tensors, start, stop, options)
    theirs = by_torch(tensors, start, stop, options)
    eps, rows = torch.finfo(tensors[0].dtype).eps, found[1].numel()
    for name, t, a, b in zip(NAMES, truth(tensors, start, stop, options), found, theirs, strict=False):
        assert torch.equal(a.isinf(), t.isinf()), name
        finite = t.isfinite()
        if not finite.any():
            continue
        t, a, b = t[finite], a[finite].double(), b[finite].double()
        assert not a.isnan().any(), name
        unit = 8 * 1.2e-7 if name == "lse" else eps * (8 if eps < 1e-5 else 2)
        error, budget = float((a - t).abs().max()), float((b - t).abs().max())
        size = float(t.abs().max())
        if name == "lse":
            size = max(size, 1.0)
        elif name != "out" and (eps < 1e-5 or name == "sinks"):
            # Sums over rows that cancel leave less than the rounding of their terms.
            size = max(size, 1.0, 0.1 * rows**0.5)
        assert error <= factor * budget + unit * size, f"{name}: {error:.3g} > {budget:.3g}"
    return found


# Three-way error budget: our error may be twice that of torch's own dense attention in the same
# dtype, and some rounding of the result on top.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
reference = functools.partial(thought_attention, return_lse=True, impl="reference")


def budget(names, ours, theirs, truth, dtype, roundings=1):
    """Largest errors against fp64, where torch's own are the measure.

    ``roundings``: more than one where "torch's own" is the reference, which keeps weights and output in
    fp32 until the end; a kernel rounds the weights for the matrix units, and reads the rounded output.
    """
    for name, a, b, true in zip(names, ours, theirs, truth, strict=True):
        if not true.numel():
            continue
        size, error, own = (float(t.detach().abs().max()) for t in (true, a - true, b - true))
        allowed = 2.0 * own + roundings * ROUNDING[dtype] * max(1.0, size)
        assert error <= allowed, f"{name}: {error}, and torch's own {own}"

"""Any input at all: an operator gives what the fp64 reference gives, or a ValueError or TypeError.

A call is drawn, every tensor gets a layout at random (strided, transposed, unaligned, expanded, lazily
negated), and then, half of the time, one argument is spoilt: another shape, dtype, device or layout, no
tensor at all, or an option out of range.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import seeds
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quietstar_ext as ext

SMALL = st.sampled_from((2, 3, 1, 5, 4, 2, 3, 5, 0))  # empty now and then
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Relative to the largest number of a result, for rounding of inputs and results alike.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LAYOUTS = ("plain", "transposed", "gaps", "unaligned", "negated", "expanded")


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other memory; an expanded dimension repeats its first entry."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps" and tensor.ndim:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), 7).to(tensor.dtype)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "unaligned":
        memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        return memory[1:].copy_(tensor.flatten()).view(tensor.shape)
    if layout == "negated" and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    if layout == "expanded" and tensor.ndim and tensor.shape[0] > 1:
        return tensor[:1].expand_as(tensor)
    return tensor


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def attention(draw: Any, g: torch.Generator) -> dict[str, Any]:
    b, hkv, group, sq, m, n, d = (draw(SMALL) for _ in range(7))
    sk = sq + draw(SMALL) if draw(st.booleans()) else sq
    start = torch.randint(-2, n + 3, (b, m), generator=g, dtype=torch.int32)
    stop = torch.randint(-2, n + 3, (b, m), generator=g, dtype=torch.int32)
    return {
        "q": randn(g, b, hkv * group, sq, m, d),
        "k_text": randn(g, b, hkv, n, d),
        "v_text": randn(g, b, hkv, n, d),
        "k_thought": randn(g, b, hkv, sk, m, d),
        "v_thought": randn(g, b, hkv, sk, m, d),
        "text_start": start,
        "text_stop": stop,
        "scale": draw(st.sampled_from((None, 0.3, -1.0))),
        "sliding_window": draw(st.sampled_from((None, 1, 3, 100))),
        "softcap": draw(st.sampled_from((None, 2.0))),
        "sinks": randn(g, hkv * group) if draw(st.booleans()) else None,
    }


@st.composite
def sampling(draw: Any, g: torch.Generator) -> dict[str, Any]:
    vocab = draw(st.integers(0, 40))
    return {
        "logits": randn(g, draw(SMALL), vocab) * 3,
        "temperature": draw(st.sampled_from((0.0, 0.5, 1.0, 3.0))),
        "top_k": draw(st.sampled_from((0, 1, 3, 100))),
        "top_p": draw(st.sampled_from((1.0, 0.5))),
        "min_p": draw(st.sampled_from((0.0, 0.2))),
        "banned": draw(st.none() | st.lists(st.integers(0, max(0, vocab - 1)), max_size=3)),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "offset": draw(st.integers(0, 2**40)),
    }


@st.composite
def cross_entropy(draw: Any, g: torch.Generator) -> dict[str, Any]:
    rows, vocab, d = draw(SMALL), draw(st.integers(0, 40)), draw(SMALL)
    targets = torch.randint(0, max(1, vocab), (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < 0.3] = -100
    return {
        "hidden": randn(g, rows, d),
        "weight": randn(g, vocab, d),
        "targets": targets,
        "temperature": draw(st.sampled_from((1.0, 3.0))),
        "banned": draw(st.none() | st.lists(st.integers(0, max(0, vocab - 1)), max_size=2)),
        "softcap": draw(st.sampled_from((None, 2.0))),
        "logit_scale": draw(st.sampled_from((1.0, 0.25))),
    }


@st.composite
def mixing(draw: Any, g: torch.Generator) -> dict[str, Any]:
    rows, positions, d = draw(SMALL), draw(SMALL), draw(SMALL)
    indexed = draw(st.booleans())
    index = torch.randint(0, max(1, positions), (rows,), generator=g)
    return {
        "base": randn(g, positions if indexed else rows, d),
        "thought": randn(g, rows, d),
        "w1": randn(g, d, 2 * d),
        "b1": randn(g, d),
        "w2": randn(g, d, d),
        "b2": randn(g, d),
        "w3": randn(g, 1, d),
        "activation": draw(st.sampled_from(("identity", "sigmoid"))),
        "base_index": index if indexed else None,
    }


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "thought_attention": (ext.thought_attention, attention),
    "sample_tokens": (ext.sample_tokens, sampling),
    "linear_cross_entropy": (ext.linear_cross_entropy, cross_entropy),
    "mixing_head": (ext.mixing_head, mixing),
}

SPOILT_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a longer dimension": lambda t: torch.cat([t, t[:1]]) if t.ndim and len(t) else t[None],
    "a dimension less": lambda t: t.flatten()[:1].squeeze(),
    "a dimension more": lambda t: t[None],
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "no memory": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "a list": lambda t: t.tolist(),
    "none": lambda t: None,
    # Of numbers far larger, rounding alone would be larger than any tolerance on a loss.
    "huge": lambda t: torch.full_like(t, 100 if t.is_floating_point() else 2**31 - 1),
    "negative": lambda t: -t.abs() - 1,
}
SPOILT_OPTIONS = (None, -1, 0, 1e40, float("nan"), float("inf"), 2**200, "x", [10**9], [-1], True)


@st.composite
def calls(draw: Any, name: str) -> dict[str, Any]:
    """Arguments, in half of the cases one of them spoilt."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(FLOATS))
    arguments = draw(OPERATORS[name][1](g))
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value = value.to(dtype) if value.is_floating_point() else value
            arguments[key] = lay_out(value, draw(st.sampled_from(LAYOUTS)))
    if draw(st.booleans()):
        key = draw(st.sampled_from(sorted(arguments)))
        value = arguments[key]
        if isinstance(value, torch.Tensor):
            arguments[key] = SPOILT_TENSORS[draw(st.sampled_from(sorted(SPOILT_TENSORS)))](value)
        else:
            arguments[key] = draw(st.sampled_from(SPOILT_OPTIONS))
    return arguments


def run(operator: Callable[..., Any], arguments: dict[str, Any], **more: Any) -> list[torch.Tensor]:
    result = operator(**arguments, **more)
    return list(result) if isinstance(result, tuple) else [result]


def in_float64(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_an_answer_or_an_error(name: str) -> None:
    fuzz(name, 400)


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_an_answer_or_an_error_on_cuda(name: str, cuda_on_cpu: ModuleType) -> None:
    before = cuda_on_cpu.launches()
    fuzz(name, 150)
    assert cuda_on_cpu.launches() > before


def fuzz(name: str, examples: int) -> None:
    operator = OPERATORS[name][0]
    counts = {"answered": 0, "refused": 0}

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=not seeds.FRESH,
    )
    @given(calls(name))
    def check(arguments: dict[str, Any]) -> None:
        try:
            ours = run(operator, arguments)
        except (ValueError, TypeError) as error:
            assert len(str(error)) > 10, error
            counts["refused"] += 1
            return
        counts["answered"] += 1
        if any(t.is_meta for t in arguments.values() if isinstance(t, torch.Tensor)):
            return
        exact = {k: in_float64(v) for k, v in arguments.items()}
        truth = run(operator, exact, impl="reference")
        tensors = [*ours, *(t for t in arguments.values() if isinstance(t, torch.Tensor))]
        compare(name, ours, truth, max(TOLERANCE.get(t.dtype, 0) for t in tensors))

    check()
    # Both ends of the rule were met.
    assert min(counts.values()) > examples // 20, counts


def compare(name: str, ours: list[torch.Tensor], truth: list[torch.Tensor], tolerance: float) -> None:
    if name == "sample_tokens":
        # A draw at an interval's edge may go to either side; its probability then differs, too.
        same = ours[0] == truth[0]
        assert (~same).sum() <= 1
        ours, truth = [ours[1][same]], [truth[1][same]]
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape
        # What float16 cannot hold is inf there, and a large number in the truth.
        limit = torch.finfo(a.dtype).max if a.is_floating_point() else 2**63
        a, b = a.double().clamp(-limit, limit), b.double().clamp(-limit, limit)
        size = b[b.isfinite()].abs().max() if b.isfinite().any() else b.new_ones(())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(size)), equal_nan=True)

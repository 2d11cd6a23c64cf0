"""Columns of several rationales that lie rationale by rationale: one call of the stock kernel a row.

On the CPU the stock half is torch's CPU flash attention and the diagonal kernel is the CUDA source run
there; on a GPU both are what users get. What a GPU's stock kernels are handed is looked at without one,
in tensors that have strides and no memory.
"""

from __future__ import annotations

import pytest
import torch
from attention_budget import ROUNDING, budget, reference
from attention_cases import TENSORS, every_position, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar_ext import thought_attention
from quietstar_ext.operators import implementations
from quietstar_ext.thought_attention import composed, stock
from quietstar_ext.thought_attention.call import ThoughtAttention

NAMES = ["out", *TENSORS, "sinks"]
#         B  Hq Hkv Sq Sk  N  R   D
SHAPES = [
    (2, 4, 2, 3, 3, 5, 1, 8),
    (1, 4, 1, 15, 15, 6, 2, 64),
    (2, 6, 2, 2, 5, 4, 3, 24),
    (2, 2, 2, 1, 4, 7, 2, 16),
    (1, 4, 2, 1, 0, 6, 3, 40),
    (1, 2, 1, 3, 3, 1, 2, 96),
]


def as_model(tensor: torch.Tensor) -> torch.Tensor:
    """The same leaf in a model's memory order, heads behind positions."""
    return tensor.detach().movedim(1, -2).contiguous().movedim(-2, 1).requires_grad_()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 64}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(device, dtype, shape, options):
    """Composed against the reference, in a model's order in memory and in the plain one."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the stock kernel on a GPU takes no float32")
    options = dict(options)
    made, start, stop, sinks = every_position(
        *shape, dtype, device, options.pop("sinks", False), rationale_major=True
    )
    leaves = [] if sinks is None else [sinks]
    options |= {"scale": 0.3}
    promises = {"every_position": True, "rationale_major": True, "impl": "composed"}

    def run(inputs):
        more = inputs[5] if leaves else None
        result, _ = reference(*inputs[:5], start, stop, sinks=more, **options)
        return [result, *gradients([result], inputs)]

    truth = run([t.detach().double().requires_grad_() for t in (*made, *leaves)])
    theirs = run([t.detach().clone().requires_grad_() for t in (*made, *leaves)])
    for tensors in (made, [as_model(t) for t in made]):
        out = thought_attention(*tensors, start, stop, sinks=sinks, **options, **promises)
        assert out.stride() == tensors[0].stride()
        ours = [out, *gradients([out], [*tensors, *leaves])]
        budget(NAMES[:6], ours[:6], theirs[:6], truth[:6], dtype, roundings=3)
        for found, true in zip(ours[6:], truth[6:], strict=True):
            rows = made[0][:, 0, ..., 0].numel()  # that are summed, each with its rounded out
            error = float((found - true).detach().abs().max())
            assert error <= 2 * ROUNDING[dtype] * rows**0.5


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 4, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("rationales", [1, 2, 3])
def test_order_of_columns_is_all_that_changes(impl, options, rationales):
    """Elsewhere it is a promise like every_position: the same numbers, in the other order."""
    shape = (2, 4, 2, 3, 3, 5, rationales, 8)
    tensors, start, stop, sinks = every_position(*shape, torch.float32, "cpu", sinks=True)
    order = torch.arange(stop.shape[1]).unflatten(0, (-1, rationales)).T.flatten()
    moved = [t.detach() for t in tensors[:3]]
    moved = [moved[0][:, :, :, order], *moved[1:], *(t.detach()[:, :, :, order] for t in tensors[3:])]
    options |= {"sinks": sinks, "every_position": True, "impl": impl}
    inputs = [t.requires_grad_() for t in moved]
    start, stop = start[:, order], stop[:, order]
    assert torch.equal(stop[0], torch.arange(5 * rationales, dtype=torch.int32) % 5 + 1)
    there = thought_attention(*inputs, start, stop, rationale_major=True, **options)
    here = thought_attention(*inputs, start, stop, **(options | {"every_position": False}))
    assert torch.equal(there, here)
    for a, b in zip(gradients([there], inputs), gradients([here], inputs), strict=True):
        assert torch.equal(a, b)


def test_gradient_of_lse(device):
    """The stock backward takes no gradient of lse; the fused kernel finds it, with any columns."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors, start, stop, _ = every_position(1, 2, 1, 2, 2, 5, 2, 8, dtype, device, rationale_major=True)
    promises = {"every_position": True, "rationale_major": True, "impl": "composed"}
    results = thought_attention(*tensors, start, stop, scale=0.5, return_lse=True, **promises)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = reference(*exact, start, stop, scale=0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(gradients(results, tensors), gradients(truth, exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * max(1, float(b.abs().max())))


# ---- how often the stock kernels are called, and what is copied for them


class Copies(TorchDispatchMode):
    """How many numbers each copy has."""

    OPERATORS = ("aten::clone", "aten::contiguous", "aten::copy_", "aten::_to_copy", "aten::cat")

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        if operator.name().partition(".")[0] in self.OPERATORS:
            self.sizes.append(made.numel() * made.itemsize)
        return made


def watched_operators(monkeypatch, kernel):
    """Calls of a GPU's stock kernel, whose results are as it would leave them; the slots' kernel does
    nothing. By direction, the tensors of each call by name."""
    calls = {"forward": [], "backward": []}

    def forward(q, k, v, *rest, **options):
        calls["forward"].append({"q": q, "k": k, "v": v})
        lse = q.new_empty((*q.shape[:-1], *((1,) if kernel == "cudnn" else ())), dtype=torch.float32)
        return torch.empty_like(q), lse, None

    def backward(dout, q, k, v, out, lse, *rest, **options):
        calls["backward"].append({"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse})
        return tuple(torch.empty_like(t) for t in (q, k, v))

    name = f"_scaled_dot_product_{kernel}_attention"
    monkeypatch.setattr(torch.ops.aten, name, forward, raising=False)
    monkeypatch.setattr(torch.ops.aten, f"{name}_backward", backward, raising=False)
    monkeypatch.setattr(composed, "diagonal_forward", lambda call: None)
    monkeypatch.setattr(composed, "diagonal_backward", lambda call: None)
    return calls


def in_model(shape, rationale_major):
    """q, keys, values and ranges of a packed pass, which have no memory."""
    b, hq, hkv, sq, sk, length, rationales, size = shape

    def rows(heads, *sizes):
        made = torch.empty(b, *sizes, heads, size, dtype=torch.bfloat16, device="meta")
        return made.movedim(-2, 1)

    columns = length * rationales
    text = [rows(hkv, length) for _ in range(2)]
    slots = [rows(hkv, sk, columns) for _ in range(2)]
    ranges = [torch.empty(b, columns, dtype=torch.int32, device="meta") for _ in range(2)]
    return ThoughtAttention(rows(hq, sq, columns), *text, *slots, *ranges, None, 0.3, 0, 0.0)


@pytest.mark.parametrize("kernel", stock.KERNELS)
@pytest.mark.parametrize("rationales", [1, 2, 3])
def test_one_call_a_row_and_no_copies_of_queries(monkeypatch, rationales, kernel):
    """Neither forward nor backward copies q, out or its gradient; cuDNN's kernel gets its own keys."""
    calls = watched_operators(monkeypatch, kernel)
    b, hq, hkv, slots, _, length, _, size = shape = (2, 8, 2, 3, 3, 16, rationales, 64)
    of_keys, of_lse = (2 * slots * rationales * length * n for n in (hkv * size, 2 * hq))
    with stock.use_stock(kernel):
        call = in_model(shape, True)
        with Copies() as copies:
            out, lse = implementations["quietstar::thought_attention_composed"](*call, True)
        assert copies.sizes == ([of_keys] * 2 * b if kernel == "cudnn" else [])
        assert out.stride() == call.q.stride()
        with Copies() as copies:
            implementations["quietstar::thought_attention_composed_backward"](
                *call, out, lse, torch.empty_like(out), None, True
            )
    expected = [of_keys, of_keys, of_lse] if kernel == "cudnn" else [of_lse]
    assert sorted(copies.sizes) == sorted(expected * b)
    for made in calls.values():
        assert len(made) == b
        for tensors in made:
            assert tensors["q"].shape == (slots * rationales, hq, length, size)
            assert tensors["k"].stride(0) == (0 if kernel == "flash" else hkv * length * size)
            for name in {"dout", "out"} & set(tensors):
                assert tensors[name].stride() == tensors["q"].stride()
                assert tensors[name].transpose(1, 2).is_contiguous()


def test_position_major_columns_are_a_call_each(monkeypatch):
    """What every_position alone means has not changed: one rationale is every other column."""
    calls = watched_operators(monkeypatch, "flash")
    call = in_model((2, 4, 2, 3, 3, 16, 3, 64), False)
    implementations["quietstar::thought_attention_composed"](*call)
    assert [c["q"].shape for c in calls["forward"]] == [(3, 4, 16, 64)] * 6


@pytest.mark.cuda_on_cpu
def test_where_the_order_gains(cuda_on_cpu):
    """Where the composed path would be taken, for the dtype in which autocast calls it."""
    rows, k_text = torch.empty(1, 4, 30, 16), torch.empty(1, 2, 4, 16)

    def gains(rows=rows, k_text=k_text, grid=(3, 8), window=None, softcap=None):
        return composed.gains_by_rationale_major(rows, k_text, grid, window, softcap)

    assert not gains()  # a short text
    with composed.use_path("composed"):
        assert gains() and gains(window=7)
        assert not gains(window=6) and not gains(softcap=2.0) and not gains(grid=(3, 7))
    with composed.use_path("fused"):
        assert not gains()


def test_dtype_of_autocast_decides(monkeypatch):
    """Layers may hand on fp32 that the call casts."""
    asked = []
    monkeypatch.setattr(
        composed, "path_of", lambda impl, call, every: asked.append(call.q) or "composed"
    )
    rows = torch.empty(1, 4, 30, 16)
    for on, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            assert composed.gains_by_rationale_major(rows, rows, (3, 8), None, None)
        assert asked[-1].dtype == dtype and asked[-1].shape == (1, 4, 3, 8, 16)


@pytest.mark.parametrize(
    ("cut", "is_read"),
    [
        (lambda t: t[..., :16], True),  # rows with something between them
        (lambda t: t.transpose(1, 2), True),
        (lambda t: t[:, :, 1::2], True),
        (lambda t: t[:1].expand(4, -1, -1, -1), False),
        (lambda t: t[..., 4:20], False),  # rows that begin within 16 bytes
        (lambda t: t[..., ::2], False),
        (lambda t: t.transpose(2, 3), False),
    ],
)
def test_what_cudnn_reads_in_place(monkeypatch, cut, is_read):
    """Strided queries as a model has them; out and its gradient as its own forward leaves out."""
    calls = watched_operators(monkeypatch, "cudnn")
    with stock.use_stock("cudnn"):
        q = cut(torch.empty(4, 6, 16, 32, dtype=torch.bfloat16, device="meta"))
        k = torch.empty(q.shape, dtype=torch.bfloat16, device="meta")
        out, lse = stock.stock_forward(q, k, k, 0.3)
        (forward,) = calls["forward"]
        assert (forward["q"] is q) == is_read and forward["k"] is k
        for dout in (torch.empty(q.shape, dtype=q.dtype, device="meta"), torch.empty_like(out)):
            for result in (out, torch.empty(q.shape, dtype=q.dtype, device="meta")):
                stock.stock_backward(dout, q, k, k, result, lse, 0.3)
    for backward in calls["backward"]:
        assert (backward["q"] is q) == is_read
        assert backward["dout"].stride() == backward["out"].stride() == out.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", stock.KERNELS)
@pytest.mark.parametrize(
    "shape", [(2, 32, 8, 15, 15, 256, 1, 128), (1, 8, 8, 15, 15, 1000, 2, 64)], ids=str
)
def test_agrees_with_the_fused_kernel(shape, kernel):
    """In a model's memory order, where nothing of q, out and its gradient is copied, and called twice:
    the second time torch has its cuDNN graph."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made, start, stop, _ = every_position(*shape, torch.bfloat16, "cuda", rationale_major=True)
    tensors = [as_model(t) for t in made]
    weights = as_model(torch.randn_like(made[0])).detach()
    promises = {"every_position": True, "rationale_major": True, "return_lse": True}
    found = []
    for impl in ("fused", "composed", "composed"):
        with stock.use_stock(kernel):
            out, lse = thought_attention(*tensors, start, stop, impl=impl, **promises)
            found.append([lse, out, *torch.autograd.grad(out, tensors, weights)])
    for others in found[1:]:
        for a, b in zip(others, found[0], strict=True):
            error = float((a - b).float().abs().max() / b.float().abs().max())
            assert error < 2e-2


def test_copies_hold_the_same_numbers():
    """Out and gradient of any strides, laid out as queries are."""
    q = torch.empty(3, 5, 4, 16, dtype=torch.bfloat16).transpose(1, 2)
    order = stock._memory_order(q)
    for made in (
        torch.randn(3, 4, 5, 16),
        torch.randn(4, 5, 3, 16).movedim(2, 0),
        torch.randn(3, 4, 16, 5).mT,
    ):
        made = made.bfloat16()
        found = stock._in_order_of(made, order)
        assert torch.equal(found, made) and found.stride() == q.stride()

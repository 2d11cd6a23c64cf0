"""thought_attention against two slow constructions of the visibility rule, written differently."""

from __future__ import annotations

import logging

import pytest
import torch
from attention_cases import DTYPE, IMPLS, SHAPES, TOLERANCE, dense, gradients, make, row_by_row

from quietstar_ext.thought_attention import thought_attention


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_row_by_row(impl, case):
    tensors, start, stop, options = make(*case, dtype=DTYPE[impl])
    out, lse = thought_attention(*tensors, start, stop, **options, return_lse=True, impl=impl)
    wanted, wanted_lse = row_by_row(tensors, start, stop, **options)
    close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
    torch.testing.assert_close(out, wanted, **close)
    torch.testing.assert_close(lse, wanted_lse.to(lse.dtype), **close)
    inputs = [*tensors, *([options["sinks"]] if "sinks" in options else [])]
    got, want = gradients([out, lse], inputs), gradients([wanted, wanted_lse], inputs)
    for name, a, b in zip(["q", "kt", "vt", "kk", "vk", "sinks"], got, want, strict=False):
        torch.testing.assert_close(a, b, **close, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "name",
    [
        *("packed", "rollout step", "two new slots"),
        *("window", "window of one", "window within the slots", "step past its window"),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_dense_mask(impl, name):
    tensors, start, stop, options = make(*SHAPES[name], dtype=DTYPE[impl])
    out = thought_attention(*tensors, start, stop, **options, impl=impl)
    wanted = dense(tensors, start, stop, **options)
    close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
    torch.testing.assert_close(out, wanted, **close)
    got, want = gradients([out], tensors), gradients([wanted], tensors)
    torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("impl", IMPLS)
def test_text_rows_are_causal_attention(impl):
    b, h, n, d = 2, 3, 10, 8
    q, k, v = (torch.randn(b, h, n, d, dtype=DTYPE[impl]) for _ in range(3))
    start = torch.zeros(b, n, dtype=torch.int32)
    stop = torch.arange(1, n + 1, dtype=torch.int32).expand(b, n)
    none = q.new_empty(b, h, 0, n, d)
    out = thought_attention(q[:, :, None], k, v, none, none, start, stop, impl=impl)[:, :, 0]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, wanted, rtol=TOLERANCE[impl], atol=TOLERANCE[impl])


@pytest.mark.parametrize("queries", [1, 3, 6])
@pytest.mark.parametrize("window", [1, 2, 5, 6, 7, 12, 13, 14])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_column_in_a_window_is_the_end_of_one_sequence(impl, window, queries):
    """Text and slots one after the other, under the band of an ordinary decoder."""
    length, slots, close = 7, 6, {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
    tensors, _, _, _ = make(2, 4, 2, queries, slots, 1, length, 8, dtype=DTYPE[impl])
    stop = torch.full((2, 1), length, dtype=torch.int32)
    call = (*tensors, torch.zeros_like(stop), stop)
    out = thought_attention(*call, sliding_window=window, impl=impl)
    q, k_text, v_text, k_thought, v_thought = tensors
    total = length + slots
    band = torch.ones(total, total, dtype=torch.bool).tril().triu(1 - window)[-queries:]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.squeeze(3),
        torch.cat([k_text, k_thought.squeeze(3)], 2),
        torch.cat([v_text, v_thought.squeeze(3)], 2),
        attn_mask=band,
        enable_gqa=True,
    )
    torch.testing.assert_close(out.squeeze(3), wanted, **close)
    torch.testing.assert_close(
        gradients([out.squeeze(3)], tensors), gradients([wanted], tensors), **close
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_slots_behind_the_window_change_nothing(impl):
    """Not even if they would win every softmax: the same as without them, and no gradient."""
    tensors, start, stop, _ = make(1, 4, 2, 3, 30, 4, 9, 8, dtype=DTYPE[impl])
    behind = 30 - 3 - 5 + 1
    with torch.no_grad():
        for t in tensors[3:]:
            t[:, :, :behind] = 1e4
    out, lse = thought_attention(*tensors, start, stop, sliding_window=5, return_lse=True, impl=impl)
    near = [*tensors[:3], *(t[:, :, behind:] for t in tensors[3:])]
    none = torch.zeros_like(stop)
    wanted = thought_attention(*near, none, none, sliding_window=5, return_lse=True, impl=impl)
    torch.testing.assert_close((out, lse), wanted, rtol=TOLERANCE[impl], atol=TOLERANCE[impl])
    for gradient in gradients([out, lse], tensors)[3:]:
        assert not gradient[:, :, :behind].any() and gradient[:, :, behind:].any()


@pytest.mark.parametrize("window", [2, 5])
@pytest.mark.parametrize("impl", IMPLS)
def test_one_slot_at_a_time_is_the_packed_pass(impl, window):
    slots = 4
    tensors, start, stop, _ = make(2, 4, 2, slots, slots, 5, 7, 8, dtype=DTYPE[impl])
    q, k_text, v_text, k_thought, v_thought = (t.detach() for t in tensors)
    packed = thought_attention(
        q, k_text, v_text, k_thought, v_thought, start, stop, sliding_window=window, impl=impl
    )
    for s in range(slots):
        step = thought_attention(
            q[:, :, s : s + 1],
            k_text,
            v_text,
            k_thought[:, :, : s + 1],
            v_thought[:, :, : s + 1],
            start,
            stop,
            sliding_window=window,
            impl=impl,
        )
        close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
        torch.testing.assert_close(step[:, :, 0], packed[:, :, s], **close)


@pytest.mark.parametrize("impl", IMPLS)
def test_other_columns_do_not_matter(impl):
    """Columns in another order, with another neighbour, give the same rows."""
    tensors, start, stop, _ = make(1, 2, 1, 3, 3, 6, 7, 8, dtype=DTYPE[impl])
    q, k_text, v_text, k_thought, v_thought = (t.detach() for t in tensors)
    out = thought_attention(q, k_text, v_text, k_thought, v_thought, start, stop, impl=impl)
    order = torch.tensor([4, 1, 5])
    some = thought_attention(
        q[:, :, :, order],
        k_text,
        v_text,
        k_thought[:, :, :, order],
        v_thought[:, :, :, order],
        start[:, order],
        stop[:, order],
        impl=impl,
    )
    close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
    torch.testing.assert_close(some, out[:, :, :, order], **close)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_sees_nothing(impl, with_sinks):
    tensors, start, stop, options = make(
        2, 2, 1, 1, 0, 4, 5, 8, {"sinks": with_sinks}, dtype=DTYPE[impl]
    )
    sinks = options["sinks"] if with_sinks else None
    start[:, 1], stop[:, 1] = 3, 3
    start[:, 2], stop[:, 2] = 4, 2
    out, lse = thought_attention(*tensors, start, stop, sinks=sinks, return_lse=True, impl=impl)
    for column in (1, 2):
        assert torch.equal(out[:, :, 0, column], torch.zeros_like(out[:, :, 0, column]))
        alone = torch.full((2,), -torch.inf) if sinks is None else sinks
        torch.testing.assert_close(lse[0, :, 0, column], alone.to(lse.dtype))
    # Through lse = -inf too the gradient is 0 and not NaN.
    for grad in torch.autograd.grad(out.sum() + lse.sum(), tensors, materialize_grads=True):
        assert grad.isfinite().all()
    (grad,) = torch.autograd.grad(thought_attention(*tensors, start, stop, impl=impl).sum(), tensors[:1])
    assert not grad[:, :, :, 1:3].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_ranges_past_the_text_hold_no_keys(impl):
    tensors, _, _, _ = make(1, 2, 1, 2, 2, 3, 5, 4, dtype=DTYPE[impl])
    wide = [torch.tensor([[-7, 2, 9]]).int(), torch.tensor([[3, 40, 12]]).int()]
    exact = [torch.tensor([[0, 2, 5]]).int(), torch.tensor([[3, 5, 5]]).int()]
    torch.testing.assert_close(
        thought_attention(*tensors, *wide, impl=impl),
        thought_attention(*tensors, *exact, impl=impl),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits(impl):
    """Scores of thousands neither overflow nor turn a row into NaN."""
    tensors, start, stop, _ = make(1, 2, 1, 2, 2, 3, 6, 4, dtype=DTYPE[impl])
    tensors = [(t.detach() * 300).requires_grad_() for t in tensors]
    out, lse = thought_attention(*tensors, start, stop, scale=1.0, return_lse=True, impl=impl)
    wanted, wanted_lse = row_by_row(tensors, start, stop, scale=1.0)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, wanted_lse.to(lse.dtype), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 1, 2, 2, 3, 4, 8), (1, 2, 1, 2, 2, 0, 4, 8), (1, 2, 1, 1, 0, 3, 0, 8)],
    ids=["no batch", "no columns", "no keys"],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl, shape):
    tensors, start, stop, _ = make(*shape, dtype=DTYPE[impl])
    out, lse = thought_attention(*tensors, start, stop, return_lse=True, impl=impl)
    assert out.shape == tensors[0].shape
    assert lse.shape == tensors[0].shape[:-1]
    assert not out.any()
    grads = torch.autograd.grad(out.sum(), tensors, allow_unused=True, materialize_grads=True)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    """Projections before their transpose, and the filled part of a cache, poisoned beyond."""
    b, hq, hkv, s, m, n, d = 2, 4, 2, 3, 5, 7, 8
    dtype = DTYPE[impl]
    q = torch.randn(b, s, m, hq, d, dtype=dtype).permute(0, 3, 1, 2, 4)
    k_text, v_text = torch.randn(2, b, n, hkv, d, dtype=dtype).transpose(2, 3)
    buffer = torch.full((2, b, hkv, 8, m, d), torch.nan, dtype=dtype)
    buffer[:, :, :, :s] = torch.randn(2, b, hkv, s, m, d, dtype=dtype)
    k_thought, v_thought = buffer[:, :, :, :s]
    stop = torch.randint(1, n + 1, (m, b), dtype=torch.int32).T
    strided = [q, k_text, v_text, k_thought, v_thought, torch.zeros_like(stop), stop]
    close = {"rtol": TOLERANCE[impl], "atol": TOLERANCE[impl]}
    torch.testing.assert_close(
        thought_attention(*strided, impl=impl),
        thought_attention(*(t.contiguous() for t in strided), impl=impl),
        **close,
    )


@pytest.mark.parametrize("name", ["packed", "text rows", "window within the slots", "everything"])
def test_gradcheck(name):
    tensors, start, stop, options = make(*SHAPES[name])
    sinks = options.pop("sinks", None)
    # No range is empty: -inf has no finite difference.
    stop.clamp_(min=1)
    start.clamp_(max=0)

    def call(*inputs):
        cap = inputs[5] if len(inputs) > 5 else None
        return thought_attention(
            *inputs[:5], start, stop, **options, sinks=cap, return_lse=True, impl="reference"
        )

    inputs = [*tensors, *([sinks] if sinks is not None else [])]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_error_budget(impl, dtype):
    """Our error against the fp64 truth is within that of PyTorch's attention in the same dtype."""
    tensors, start, stop, _ = make(2, 4, 2, 4, 4, 16, 33, 32, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth_out = dense(exact, start, stop)
    truth = [truth_out, *gradients([truth_out], exact)]
    ours_out = thought_attention(*tensors, start, stop, impl=impl)
    assert ours_out.dtype == dtype
    ours = [ours_out, *gradients([ours_out], tensors)]
    theirs_out = dense(tensors, start, stop)
    theirs = [theirs_out, *gradients([theirs_out], tensors)]
    # In fp32 both are sums in some order, so neither is the better one.
    unit = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for name, t, a, b in zip(["out", "q", "kt", "vt", "kk", "vk"], truth, ours, theirs, strict=True):
        size = t.abs().max()
        error, budget = (a - t).abs().max(), (b - t).abs().max()
        assert error <= budget + unit * size, f"{name}: {error:.3g} > {budget:.3g}"


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    tensors, start, stop, _ = make(1, 2, 1, 2, 2, 3, 5, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = thought_attention(*tensors, start, stop, impl=impl)
    wanted = thought_attention(*(t.bfloat16() for t in tensors), start, stop, impl=impl)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wanted)
    assert all(grad.dtype == torch.float32 for grad in gradients([out], tensors))


@pytest.mark.parametrize("name", ["packed", "text rows", "everything"])
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph(impl, name):
    torch.compiler.reset()
    tensors, start, stop, options = make(*SHAPES[name], dtype=DTYPE[impl])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*inputs):
        return thought_attention(*inputs, start, stop, **options, return_lse=True, impl=impl)

    out, lse = compiled(*tensors)
    wanted = thought_attention(*tensors, start, stop, **options, return_lse=True, impl=impl)
    torch.testing.assert_close((out, lse), wanted)
    torch.testing.assert_close(gradients([out], tensors), gradients(wanted[:1], tensors))


def test_memory_is_that_of_the_scores():
    """No tensor of slots x slots: the largest one holds text scores of every row."""
    b, hq, hkv, s, m, n, d = 1, 2, 1, 6, 20, 10, 4
    tensors, start, stop, _ = make(b, hq, hkv, s, s, m, n, d)
    largest = 0

    def note(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        thought_attention(*tensors, start, stop, impl="reference")
    assert largest == b * hq * s * m * n


def test_fused_never_falls_back():
    tensors, start, stop, _ = make(1, 1, 1, 1, 1, 1, 1, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 and float16, not float64"):
        thought_attention(*tensors, start, stop, impl="fused")


def test_auto_is_the_kernel():
    tensors, start, stop, _ = make(*SHAPES["packed"], dtype=torch.float32)
    out = thought_attention(*tensors, start, stop)
    assert torch.equal(out, thought_attention(*tensors, start, stop, impl="fused"))
    assert type(out.grad_fn).__name__ == "_ThoughtAttentionBackward"


def test_auto_says_that_it_uses_the_reference(caplog):
    from quietstar_ext import dispatch

    tensors, start, stop, _ = make(1, 1, 1, 1, 1, 1, 1, 1, dtype=torch.float64)
    dispatch._said.clear()
    with caplog.at_level(logging.WARNING, logger="quietstar_ext"):
        thought_attention(*tensors, start, stop)
        thought_attention(*tensors, start, stop)
    assert len(caplog.records) == 1
    assert "reference" in caplog.text


def changed(index, value):
    def change(arguments):
        arguments[index] = value(arguments[index])

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (changed(0, lambda t: t[0]), {}, r"q has shape .*; expected \[B, Hq, Sq, M, D\]"),
        (changed(0, lambda t: t.long()), {}, "q has dtype int64; expected float32"),
        (changed(1, lambda t: t[..., :3]), {}, "k_text has shape"),
        (changed(1, lambda t: t.float()), {}, "k_text has dtype float32; expected float64"),
        (changed(2, lambda t: t[:, :, 1:]), {}, "v_text has shape"),
        (changed(3, lambda t: t[:, :, :, 1:]), {}, "k_thought has shape"),
        (changed(3, lambda t: t.to("meta")), {}, "k_thought is on meta; expected cpu"),
        (changed(4, lambda t: t[:, :, 1:]), {}, "v_thought has shape"),
        (changed(5, lambda t: t.long()), {}, "text_start has dtype int64; expected int32"),
        (changed(6, lambda t: t[:, 1:]), {}, "text_stop has shape"),
        (changed(0, lambda t: t[:, :3]), {}, "q has 3 heads and k_text 2; expected .* multiple"),
        (changed(0, lambda t: t.repeat(1, 1, 2, 1, 1)), {}, "k_thought has 2 slots and q has 4"),
        (lambda arguments: None, {"sliding_window": 0}, "sliding_window is 0"),
        (lambda arguments: None, {"softcap": -1.0}, "softcap is -1.0"),
        (
            lambda arguments: None,
            {"sinks": torch.zeros(3)},
            r"sinks has shape \[3\]; expected \[4\]",
        ),
        (lambda arguments: None, {"impl": "fast"}, "impl is 'fast'; expected one of auto"),
    ],
)
def test_errors(change, options, message):
    tensors, start, stop, _ = make(2, 4, 2, 2, 2, 3, 5, 4)
    arguments = [*tensors, start, stop]
    change(arguments)
    with pytest.raises(ValueError, match=message):
        thought_attention(*arguments, **options)


def test_no_tensor():
    tensors, start, stop, _ = make(2, 4, 2, 2, 2, 3, 5, 4)
    with pytest.raises(TypeError, match=r"k_text is a list; expected a torch\.Tensor"):
        thought_attention(tensors[0], [], *tensors[2:], start, stop)

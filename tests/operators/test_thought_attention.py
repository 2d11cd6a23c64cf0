"""thought_attention against two slow constructions of the visibility rule, written differently."""

from __future__ import annotations

import logging

import pytest
import torch
from attention_cases import SHAPES, dense, gradients, made, make, row_by_row
from places import CUDA, CUDA_ON_CPU, EVERY_SIMD, place_fixture

from quietstar_ext.thought_attention import thought_attention

kernel = place_fixture((*EVERY_SIMD, CUDA_ON_CPU, CUDA))


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_equals_row_by_row(place, case):
    tensors, start, stop, options = made(place, *case)
    out, lse = thought_attention(*tensors, start, stop, **options, return_lse=True, impl=place.impl)
    wanted, wanted_lse = row_by_row(tensors, start, stop, **options)
    torch.testing.assert_close(out, wanted, **place.close)
    torch.testing.assert_close(lse, wanted_lse.to(lse.dtype), **place.close)
    inputs = [*tensors, *([options["sinks"]] if "sinks" in options else [])]
    got, want = gradients([out, lse], inputs), gradients([wanted, wanted_lse], inputs)
    for name, a, b in zip(["q", "kt", "vt", "kk", "vk", "sinks"], got, want, strict=False):
        torch.testing.assert_close(a, b, **place.close, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "name",
    [
        *("packed", "rollout step", "two new slots"),
        *("window", "window of one", "window within the slots", "step past its window"),
    ],
)
def test_equals_dense_mask(place, name):
    tensors, start, stop, options = made(place, *SHAPES[name])
    out = thought_attention(*tensors, start, stop, **options, impl=place.impl)
    wanted = dense(tensors, start, stop, **options)
    torch.testing.assert_close(out, wanted, **place.close)
    got, want = gradients([out], tensors), gradients([wanted], tensors)
    torch.testing.assert_close(got, want, **place.close)


def test_text_rows_are_causal_attention(place):
    b, h, n, d = 2, 3, 10, 8
    q, k, v = torch.randn(3, b, h, n, d, dtype=place.dtype).to(place.device)
    start = torch.zeros(b, n, dtype=torch.int32, device=place.device)
    stop = torch.arange(1, n + 1, dtype=torch.int32, device=place.device).expand(b, n)
    none = q.new_empty(b, h, 0, n, d)
    out = thought_attention(q[:, :, None], k, v, none, none, start, stop, impl=place.impl)[:, :, 0]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, wanted, **place.close)


@pytest.mark.parametrize("queries", [1, 3, 6])
@pytest.mark.parametrize("window", [1, 2, 5, 6, 7, 12, 13, 14])
def test_a_column_in_a_window_is_the_end_of_one_sequence(place, window, queries):
    """Text and slots one after the other, under the band of an ordinary decoder."""
    length, slots = 7, 6
    tensors, _, _, _ = made(place, 2, 4, 2, queries, slots, 1, length, 8)
    stop = torch.full((2, 1), length, dtype=torch.int32, device=place.device)
    call = (*tensors, torch.zeros_like(stop), stop)
    out = thought_attention(*call, sliding_window=window, impl=place.impl)
    q, k_text, v_text, k_thought, v_thought = tensors
    total = length + slots
    band = torch.ones(total, total, dtype=torch.bool, device=place.device)
    band = band.tril().triu(1 - window)[-queries:]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.squeeze(3),
        torch.cat([k_text, k_thought.squeeze(3)], 2),
        torch.cat([v_text, v_thought.squeeze(3)], 2),
        attn_mask=band,
        enable_gqa=True,
    )
    torch.testing.assert_close(out.squeeze(3), wanted, **place.close)
    torch.testing.assert_close(
        gradients([out.squeeze(3)], tensors), gradients([wanted], tensors), **place.close
    )


def test_slots_behind_the_window_change_nothing(place):
    """Not even if they would win every softmax: the same as without them, and no gradient."""
    tensors, start, stop, _ = made(place, 1, 4, 2, 3, 30, 4, 9, 8)
    behind = 30 - 3 - 5 + 1
    with torch.no_grad():
        for t in tensors[3:]:
            t[:, :, :behind] = 1e4
    options = {"sliding_window": 5, "return_lse": True, "impl": place.impl}
    out, lse = thought_attention(*tensors, start, stop, **options)
    near = [*tensors[:3], *(t[:, :, behind:] for t in tensors[3:])]
    none = torch.zeros_like(stop)
    wanted = thought_attention(*near, none, none, **options)
    torch.testing.assert_close((out, lse), wanted, **place.close)
    for gradient in gradients([out, lse], tensors)[3:]:
        assert not gradient[:, :, :behind].any() and gradient[:, :, behind:].any()


@pytest.mark.parametrize("window", [2, 5])
def test_one_slot_at_a_time_is_the_packed_pass(place, window):
    slots = 4
    tensors, start, stop, _ = made(place, 2, 4, 2, slots, slots, 5, 7, 8)
    q, k_text, v_text, k_thought, v_thought = (t.detach() for t in tensors)
    packed = thought_attention(
        q, k_text, v_text, k_thought, v_thought, start, stop, sliding_window=window, impl=place.impl
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
            impl=place.impl,
        )
        torch.testing.assert_close(step[:, :, 0], packed[:, :, s], **place.close)


def test_other_columns_do_not_matter(place):
    """Columns in another order, with another neighbour, give the same rows."""
    tensors, start, stop, _ = made(place, 1, 2, 1, 3, 3, 6, 7, 8)
    q, k_text, v_text, k_thought, v_thought = (t.detach() for t in tensors)
    out = thought_attention(q, k_text, v_text, k_thought, v_thought, start, stop, impl=place.impl)
    order = torch.tensor([4, 1, 5])
    some = thought_attention(
        q[:, :, :, order],
        k_text,
        v_text,
        k_thought[:, :, :, order],
        v_thought[:, :, :, order],
        start[:, order],
        stop[:, order],
        impl=place.impl,
    )
    torch.testing.assert_close(some, out[:, :, :, order], **place.close)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_a_row_that_sees_nothing(place, with_sinks):
    tensors, start, stop, options = made(place, 2, 2, 1, 1, 0, 4, 5, 8, {"sinks": with_sinks})
    sinks = options["sinks"] if with_sinks else None
    start[:, 1], stop[:, 1] = 3, 3
    start[:, 2], stop[:, 2] = 4, 2
    out, lse = thought_attention(*tensors, start, stop, sinks=sinks, return_lse=True, impl=place.impl)
    for column in (1, 2):
        assert torch.equal(out[:, :, 0, column], torch.zeros_like(out[:, :, 0, column]))
        alone = torch.full((2,), -torch.inf, device=place.device) if sinks is None else sinks
        torch.testing.assert_close(lse[0, :, 0, column], alone.to(lse.dtype))
    # Through lse = -inf too the gradient is 0 and not NaN.
    for grad in torch.autograd.grad(out.sum() + lse.sum(), tensors, materialize_grads=True):
        assert grad.isfinite().all()
    out = thought_attention(*tensors, start, stop, impl=place.impl)
    (grad,) = torch.autograd.grad(out.sum(), tensors[:1])
    assert not grad[:, :, :, 1:3].any()


def test_ranges_past_the_text_hold_no_keys(place):
    tensors, _, _, _ = made(place, 1, 2, 1, 2, 2, 3, 5, 4)
    wide = torch.tensor([[[-7, 2, 9]], [[3, 40, 12]]], dtype=torch.int32, device=place.device)
    exact = torch.tensor([[[0, 2, 5]], [[3, 5, 5]]], dtype=torch.int32, device=place.device)
    torch.testing.assert_close(
        thought_attention(*tensors, *wide, impl=place.impl),
        thought_attention(*tensors, *exact, impl=place.impl),
    )


def test_large_logits(place):
    """Scores of thousands neither overflow nor turn a row into NaN."""
    tensors, start, stop, _ = made(place, 1, 2, 1, 2, 2, 3, 6, 4)
    tensors = [(t.detach() * 300).requires_grad_() for t in tensors]
    out, lse = thought_attention(*tensors, start, stop, scale=1.0, return_lse=True, impl=place.impl)
    wanted, wanted_lse = row_by_row(tensors, start, stop, scale=1.0)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, wanted_lse.to(lse.dtype), rtol=1e-5, atol=1e-3)
    assert all(grad.isfinite().all() for grad in gradients([out, lse], tensors))


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


def test_gradient_of_lse_alone(place):
    tensors, start, stop, _ = made(place, 1, 2, 1, 3, 3, 5, 9, 8)
    _, lse = thought_attention(*tensors, start, stop, return_lse=True, impl=place.impl)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    _, truth = thought_attention(*exact, start, stop, return_lse=True, impl="reference")
    for a, b in zip(gradients([lse], tensors), gradients([truth], exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_stays_in_its_row(kernel, dtype, softcap):
    tensors, start, stop, _ = made(kernel, 1, 2, 1, 3, 3, 8, 40, 16, dtype=dtype)
    start.zero_()
    stop.fill_(40)
    with torch.no_grad():
        tensors[0][0, 0, 1, 4] = torch.nan
    out, lse = thought_attention(*tensors, start, stop, softcap=softcap, return_lse=True, impl="fused")
    assert out[0, 0, 1, 4].isnan().all() and lse[0, 0, 1, 4].isnan()
    assert int(out.isnan().any(-1).sum()) == 1
    dq, dk_text, *_ = torch.autograd.grad(out.sum(), tensors)
    assert dq[0, 0, 1, 4].isnan().all() and int(dq.isnan().any(-1).sum()) == 1
    assert dk_text.isnan().all()


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

"""thought_attention against two slow constructions of the visibility rule, written differently."""

from __future__ import annotations

import logging

import pytest
import torch

from quietstar_ext.native import native
from quietstar_ext.thought_attention import thought_attention

# The kernel is given fp32, the reference fp64.
IMPLS = ["reference", "fused"]
DTYPE = {"reference": torch.float64, "fused": torch.float32}
TOLERANCE = {"reference": 1e-12, "fused": 2e-5}

#            B  Hq Hkv Sq Sk  M  N  D   options
SHAPES = {
    "packed": (2, 4, 2, 3, 3, 5, 6, 8, {}),
    "rollout step": (2, 2, 2, 1, 4, 7, 5, 16, {}),
    "two new slots": (1, 4, 1, 2, 5, 3, 9, 5, {}),
    "generation": (3, 2, 1, 1, 2, 1, 11, 7, {}),
    "text rows": (2, 4, 2, 1, 0, 6, 6, 8, {}),
    "text rows in a window": (2, 2, 1, 1, 0, 9, 9, 4, {"sliding_window": 3}),
    "window": (2, 2, 2, 4, 4, 6, 8, 8, {"sliding_window": 4}),
    "window of one": (1, 2, 1, 3, 3, 4, 5, 4, {"sliding_window": 1}),
    "window past the start": (1, 2, 1, 2, 3, 4, 5, 4, {"sliding_window": 100}),
    "softcap": (2, 4, 2, 2, 3, 4, 5, 8, {"softcap": 1.5}),
    "scale": (1, 2, 1, 2, 2, 3, 4, 6, {"scale": 0.9}),
    "sinks": (2, 4, 2, 2, 2, 3, 4, 8, {"sinks": True}),
    "everything": (2, 6, 2, 2, 4, 5, 7, 3, {"sinks": True, "softcap": 2.0, "sliding_window": 5}),
    "no text": (1, 2, 1, 3, 3, 4, 0, 4, {}),
    "one element": (1, 1, 1, 1, 1, 1, 1, 1, {}),
}


@pytest.fixture(autouse=True)
def _fresh_inputs():
    print(f"torch.manual_seed({torch.seed()})")


def make(b, hq, hkv, sq, sk, m, n, d, options=None, dtype=torch.float64):
    """Random inputs: ranges of any place and length, empty ones among them, some shared."""
    tensors = [
        torch.randn(b, hq, sq, m, d),
        torch.randn(b, hkv, n, d),
        torch.randn(b, hkv, n, d),
        torch.randn(b, hkv, sk, m, d),
        torch.randn(b, hkv, sk, m, d),
    ]
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    stop = torch.randint(0, n + 1, (b, m), dtype=torch.int32)
    stop[:, -1:] = stop[:, :1]
    start = (torch.rand(b, m) * (stop + 1)).int()
    options = dict(options or {})
    if options.get("sinks"):
        options["sinks"] = torch.randn(hq, dtype=dtype, requires_grad=True)
    return tensors, start, stop, options


def seen_by(start, stop, s, query_slots, key_slots, length, window):
    """The rule, one row at a time: text positions and slots that query slot s may look at."""
    depth = s + 1 + key_slots - query_slots
    text = [
        j for j in range(length) if start <= j < stop and (window is None or j >= stop + depth - window)
    ]
    return text, list(range(depth))


def row_by_row(tensors, start, stop, scale=None, sliding_window=None, softcap=None, sinks=None):
    q, k_text, v_text, k_thought, v_thought = tensors
    b, hq, sq, m, d = q.shape
    group = hq // k_text.shape[1]
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=q.dtype)
    out, lse = out.clone(), lse.clone()
    for i in range(b):
        for h in range(hq):
            for s in range(sq):
                for c in range(m):
                    text, slots = seen_by(
                        int(start[i, c]),
                        int(stop[i, c]),
                        s,
                        sq,
                        k_thought.shape[2],
                        k_text.shape[2],
                        sliding_window,
                    )
                    g = h // group
                    keys = torch.cat([k_text[i, g, text], k_thought[i, g, slots, c]])
                    values = torch.cat([v_text[i, g, text], v_thought[i, g, slots, c]])
                    x = keys @ q[i, h, s, c] * (d**-0.5 if scale is None else scale)
                    if softcap is not None:
                        x = softcap * torch.tanh(x / softcap)
                    if sinks is not None:
                        x = torch.cat([x, sinks[h : h + 1]])
                        values = torch.cat([values, values.new_zeros(1, d)])
                    if len(x):
                        out[i, h, s, c] = torch.softmax(x, 0) @ values
                        lse[i, h, s, c] = torch.logsumexp(x, 0)
    return out, lse


def dense(tensors, start, stop, sliding_window=None):
    """One dense mask over [text, slots x columns] and PyTorch's own attention."""
    q, k_text, v_text, k_thought, v_thought = tensors
    b, _, sq, m, _ = q.shape
    sk, n = k_thought.shape[2], k_text.shape[2]
    text = torch.arange(n)
    depth = torch.arange(1, sq + 1)[:, None, None] + sk - sq
    mask = torch.zeros(b, sq, m, n + sk * m, dtype=torch.bool)
    for i in range(b):
        first, last = start[i][None, :, None], stop[i][None, :, None]
        seen = ((text >= first) & (text < last)).expand(sq, m, n)
        if sliding_window is not None:
            seen = seen & (last - 1 + depth - text < sliding_window)
        diagonals = torch.einsum("st,mc->smtc", torch.ones(sq, sk).tril(sk - sq), torch.eye(m))
        mask[i] = torch.cat([seen, diagonals.reshape(sq, m, sk * m).bool()], -1)
    k = torch.cat([k_text, k_thought.flatten(2, 3)], 2)
    v = torch.cat([v_text, v_thought.flatten(2, 3)], 2)
    group = q.shape[1] // k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        q.flatten(2, 3),
        k.repeat_interleave(group, 1),
        v.repeat_interleave(group, 1),
        attn_mask=mask.flatten(1, 2)[:, None],
    )
    return out.reshape(q.shape)


def gradients(outputs, inputs):
    """Gradients of a fixed random combination of the outputs, finite entries only."""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (o[o.isfinite()] * torch.randn(o.shape, generator=generator).to(o)[o.isfinite()]).sum()
        for o in outputs
    )
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


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


@pytest.mark.parametrize("name", ["packed", "rollout step", "two new slots", "window"])
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


@pytest.mark.parametrize("impl", IMPLS)
def test_one_slot_at_a_time_is_the_packed_pass(impl):
    slots = 4
    tensors, start, stop, _ = make(2, 4, 2, slots, slots, 5, 7, 8, dtype=DTYPE[impl])
    q, k_text, v_text, k_thought, v_thought = (t.detach() for t in tensors)
    packed = thought_attention(
        q, k_text, v_text, k_thought, v_thought, start, stop, sliding_window=5, impl=impl
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
            sliding_window=5,
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


@pytest.mark.parametrize("name", ["packed", "text rows", "everything"])
def test_gradcheck(name):
    tensors, start, stop, options = make(*SHAPES[name])
    sinks = options.pop("sinks", None)
    # No range is empty: -inf has no finite difference.
    stop.clamp_(min=1)
    start.clamp_(max=0)
    if options.get("sliding_window"):
        options["sliding_window"] += 10

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


# ---- the kernel on sizes beyond its blocks (16 keys a panel, 64 a block, 120 rows a tile)


@pytest.fixture
def poison():
    """Fills every tensor that torch.empty makes, outputs and workspace, with NaN or 0xFF."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def in_a_larger_buffer(tensor):
    """The same values as a view with gaps on every side but the last, which hold NaN."""
    buffer = tensor.new_full([size + 2 for size in tensor.shape], torch.nan)
    view = buffer[tuple(slice(1, size + 1) for size in tensor.shape)]
    view.copy_(tensor)
    return view.requires_grad_(tensor.requires_grad)


def assert_near_the_truth(tensors, start, stop, options):
    """Outputs and all gradients of the kernel against the reference in float64, as fp32 sums allow."""

    def everything(impl, dtype):
        inputs = [in_a_larger_buffer(t.detach().to(dtype)).requires_grad_() for t in tensors]
        chosen = dict(options)
        if "sinks" in chosen:
            chosen["sinks"] = chosen["sinks"].detach().to(dtype).requires_grad_()
        outputs = thought_attention(*inputs, start, stop, **chosen, return_lse=True, impl=impl)
        wanted = [*inputs, *([chosen["sinks"]] if "sinks" in chosen else [])]
        return [*outputs, *gradients(outputs, wanted)]

    truth = everything("reference", torch.float64)
    ours = everything("fused", torch.float32)
    names = ["out", "lse", "q", "k_text", "v_text", "k_thought", "v_thought", "sinks"]
    for name, a, b in zip(names, ours, truth, strict=False):
        size = b.detach()[b.isfinite()].abs().max() if b.isfinite().any() else 1
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=0,
            atol=3e-6 * max(1, float(size)),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("number", range(25))
def test_random_shapes_and_options(simd, poison, number):
    def draw(*values):
        return values[torch.randint(len(values), ())]

    hkv, groups = draw(1, 2), draw(1, 2, 3, 4)
    sk = draw(0, 1, 2, 5, 15, 17, 70)
    sq = draw(1, sk, max(1, sk - 2)) if sk else 1
    size, columns, length = draw(1, 4, 16, 24, 32, 64, 80), draw(1, 2, 7, 33), draw(0, 1, 40, 64, 150)
    options = {"sinks": draw(True, False)}
    if draw(True, False):
        options["sliding_window"] = int(torch.randint(1, 100, ()))
    if draw(True, False, False):
        options["softcap"] = 2.5
    shape = (draw(1, 2), hkv * groups, hkv, sq, sk, columns, length, size)
    print(shape, options)
    tensors, start, stop, options = make(*shape, options, dtype=torch.float32)
    options = {name: value for name, value in options.items() if value is not False}
    assert_near_the_truth(tensors, start, stop, options)


@pytest.mark.parametrize("anchors", ["sorted", "shared", "shuffled", "two documents"])
def test_many_tiles(simd, poison, anchors):
    columns = length = 150
    tensors, start, stop, _ = make(1, 4, 2, 5, 5, columns, length, 16, dtype=torch.float32)
    start.zero_()
    stop[:] = torch.arange(1, length + 1)
    if anchors == "shared":
        stop[:] = stop.sort().values // 3 * 3
    elif anchors == "shuffled":
        stop = stop[:, torch.randperm(columns)]
    elif anchors == "two documents":
        start[:, 70:] = 70
    assert_near_the_truth(tensors, start, stop, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(threads, dtype):
    tensors, start, stop, options = make(2, 4, 2, 6, 6, 90, 130, 32, {"sinks": True}, dtype=dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outputs = thought_attention(*tensors, start, stop, **options, return_lse=True, impl="fused")
        results.append([*outputs, *gradients(outputs, [*tensors, options["sinks"]])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradient_of_lse_alone():
    tensors, start, stop, _ = make(1, 2, 1, 3, 3, 5, 9, 8, dtype=torch.float32)
    _, lse = thought_attention(*tensors, start, stop, return_lse=True, impl="fused")
    exact = [t.detach().double().requires_grad_() for t in tensors]
    _, truth = thought_attention(*exact, start, stop, return_lse=True, impl="reference")
    for a, b in zip(gradients([lse], tensors), gradients([truth], exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_stays_in_its_row(simd, softcap):
    tensors, start, stop, _ = make(1, 2, 1, 3, 3, 8, 20, 8, dtype=torch.float32)
    start.zero_()
    stop.fill_(20)
    with torch.no_grad():
        tensors[0][0, 0, 1, 4] = torch.nan
    options = {"softcap": softcap, "return_lse": True, "impl": "fused"}
    out, lse = thought_attention(*tensors, start, stop, **options)
    assert out[0, 0, 1, 4].isnan().all() and lse[0, 0, 1, 4].isnan()
    assert int(out.isnan().any(-1).sum()) == 1
    dq, dk_text, *_ = torch.autograd.grad(out.sum(), tensors)
    assert dq[0, 0, 1, 4].isnan().all() and int(dq.isnan().any(-1).sum()) == 1
    assert dk_text.isnan().all()


def test_workspace_holds_no_scores():
    sizes = (1, 8, 2, 15, 15, 512, 512, 64)  # B Hq Hkv Sq Sk M N D
    scores = 8 * 15 * 512 * 512 * 4
    assert native().thought_attention_workspace(sizes, False, 2) < scores / 50
    assert native().thought_attention_workspace(sizes, True, 2) < scores / 5


@pytest.mark.parametrize("name", ["packed", "rollout step", "text rows", "everything"])
def test_operators_are_registered_well(name):
    tensors, start, stop, options = make(*SHAPES[name], dtype=torch.float32)
    inputs = [t.detach() for t in tensors]
    sinks = options["sinks"].detach() if "sinks" in options else None
    rest = (0.3, options.get("sliding_window", 0), options.get("softcap", 0.0))
    operators = torch.ops.quietstar
    call = (*inputs, start, stop, sinks, *rest)
    torch.library.opcheck(operators.thought_attention.default, call)
    out, lse = operators.thought_attention(*call)
    grads = (out, lse, torch.randn_like(out), torch.randn_like(lse))
    call = (*inputs, start, stop, sinks, *grads, *rest)
    torch.library.opcheck(operators.thought_attention_backward.default, call)
    # Inputs whose rows do not lie side by side.
    call = (inputs[0].mT.contiguous().mT, *inputs[1:], start, stop, sinks, *rest)
    torch.library.opcheck(operators.thought_attention.default, call)


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

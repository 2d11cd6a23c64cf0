"""The composed path: stock attention on the text, the diagonal kernel on the slots, merged.

On the CPU the stock half is torch's CPU flash attention and the diagonal kernel is the CUDA source run
there; on a GPU both are what users get.
"""

from __future__ import annotations

import pytest
import torch
from attention_budget import ROUNDING, budget, reference
from attention_cases import TENSORS, dense, every_position, gradients
from contract import captured
from families import tiny_decoder
from torch._subclasses.fake_tensor import FakeTensorMode

from quietstar import QuietStarForCausalLM
from quietstar.thinking import attention
from quietstar_ext import thought_attention, use_impl
from quietstar_ext.thought_attention import composed, stock
from quietstar_ext.thought_attention.call import ThoughtAttention

DTYPES = list(ROUNDING)


NAMES = ["out", *TENSORS]
#         B  Hq Hkv Sq Sk  N  R   D
SHAPES = [
    (1, 4, 2, 3, 3, 5, 2, 8),
    (2, 2, 2, 1, 4, 7, 1, 16),
    (1, 6, 2, 2, 5, 4, 3, 24),
    (1, 4, 1, 15, 15, 3, 1, 64),
    (1, 1, 1, 2, 2, 1, 2, 96),
    (1, 2, 1, 3, 18, 2, 1, 72),
    (1, 2, 2, 1, 0, 6, 1, 40),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(device, dtype, shape):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the stock kernel on a GPU takes no float32")
    tensors, start, stop, _ = every_position(*shape, dtype, device)
    options = {"every_position": True, "return_lse": True, "impl": "composed"}
    out, lse = thought_attention(*tensors, start, stop, **options)
    ours = [out, *gradients([out], tensors)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    true_out, true_lse = reference(*exact, start, stop)
    truth = [true_out, *gradients([true_out], exact)]
    low = [t.detach().cpu().requires_grad_() for t in tensors]
    stock = dense(low, start.cpu(), stop.cpu())
    theirs = [stock, *gradients([stock], low)]
    budget(NAMES, ours, [t.to(device) for t in theirs], truth, dtype)
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_and_strides(device, dtype):
    """As a model has them: tensors with the head next to the size, and logits without a value."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the stock kernel on a GPU takes no float32")
    made, start, stop, sinks = every_position(2, 4, 2, 3, 3, 4, 2, 16, dtype, device, sinks=True)
    tensors = []
    for t in made:
        rows = t.detach().flatten(2, -2).transpose(1, 2).contiguous().transpose(1, 2)
        tensors.append(rows.unflatten(2, t.shape[2:-1]).requires_grad_())
    assert not tensors[0].is_contiguous()
    options = {"scale": 0.3, "sinks": sinks, "every_position": True, "impl": "composed"}
    out = thought_attention(*tensors, start, stop, **options)
    assert out.stride() == tensors[0].stride()
    ours = [out, *gradients([out], [*tensors, sinks])]

    def run(inputs):
        result, _ = reference(*inputs[:5], start, stop, scale=0.3, sinks=inputs[5])
        return [result, *gradients([result], inputs)]

    theirs = run([t.detach().clone().requires_grad_() for t in (*tensors, sinks)])
    truth = run([t.detach().double().requires_grad_() for t in (*tensors, sinks)])
    budget(NAMES, ours[:-1], theirs[:-1], truth[:-1], dtype, roundings=3)
    # A sink's gradient sums sum(dout * out) over all rows of its head, with out as it was rounded: as
    # many roundings in any direction as there are rows.
    rows = tensors[0][:, 0, ..., 0].numel()
    error = float((ours[-1] - truth[-1]).detach().abs().max())
    assert error <= 2 * ROUNDING[dtype] * rows**0.5


def test_gradient_of_lse(device):
    """The stock backward takes no gradient of lse; the fused kernel finds it."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors, start, stop, _ = every_position(1, 2, 1, 2, 2, 5, 2, 8, dtype, device)
    options = {"scale": 0.5, "every_position": True, "return_lse": True, "impl": "composed"}
    results = thought_attention(*tensors, start, stop, **options)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = reference(*exact, start, stop, scale=0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(gradients(results, tensors), gradients(truth, exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * max(1, float(b.abs().max())))


# ---- when it applies


@pytest.mark.cuda_on_cpu
def test_reasons_against(cuda_on_cpu):
    q, k, kt = torch.empty(1, 2, 3, 8, 16), torch.empty(1, 2, 4, 16), torch.empty(1, 2, 3, 8, 16)

    def why(q=q, k=k, every=True, window=0, softcap=0.0):
        call = ThoughtAttention(q, k, k, kt, kt, None, None, None, 1.0, window, softcap)
        return composed.composed_unsupported_reason(call, every)

    assert why() is None and why(window=7) is None
    assert "every_position" in why(every=False)
    assert "window of 6" in why(window=6)
    assert "soft-cap" in why(softcap=2.0)
    assert "8 columns are not a multiple of 3" in why(k=k[:, :, :3])
    assert "larger than 256" in why(q=torch.empty(1, 2, 3, 8, 264))


def test_only_for_cuda_devices():
    tensors, start, stop, _ = every_position(1, 2, 2, 3, 3, 4, 1, 16, torch.float32, "cpu")
    with pytest.raises(
        RuntimeError, match="impl='composed' cannot be used here: it is for CUDA devices"
    ):
        thought_attention(*tensors, start, stop, every_position=True, impl="composed")


def test_which_path_a_call_takes(device):
    """By the name of the operator that ran: asked for, forced, and the other way round."""
    tensors, start, stop, _ = every_position(1, 2, 2, 2, 2, 4, 1, 16, torch.bfloat16, device)

    def taken(**options):
        with torch.profiler.profile() as profile, torch.no_grad():
            thought_attention(*tensors, start, stop, **options)
        names = {event.key for event in profile.key_averages()}
        return [
            n for n in ("thought_attention", "thought_attention_composed") if f"quietstar::{n}" in names
        ]

    fused, both = ["thought_attention"], ["thought_attention_composed"]
    assert taken(every_position=True) == fused  # a short text
    assert taken(every_position=True, impl="composed") == both
    with composed.use_path("composed"):
        assert taken(every_position=True) == both
        assert taken(every_position=True, impl="fused") == fused
        assert taken() == fused  # no promise
        with use_impl("reference"):
            assert taken(every_position=True) == []


@pytest.mark.cuda_on_cpu
def test_operators_are_registered_well(cuda_on_cpu):
    tensors, start, stop, sinks = every_position(
        1, 4, 2, 2, 2, 3, 2, 8, torch.float32, "cpu", sinks=True
    )
    inputs = [t.detach() for t in tensors]
    operators = torch.ops.quietstar
    checked, rest = ("test_schema", "test_faketensor"), (0.3, 0, 0.0)
    forward = operators.thought_attention_composed
    for order in ((), (True,)):
        call = (*inputs, start, stop, sinks.detach(), *rest, *order)
        torch.library.opcheck(forward, call, test_utils=checked)
    out, lse = forward(*inputs, start, stop, None, *rest)
    backward = operators.thought_attention_composed_backward
    arguments = (*inputs, start, stop, None, *rest, out, lse, out, None)
    for order in ((), (True,)):
        torch.library.opcheck(backward, (*arguments, *order), test_utils=checked)


def test_the_rule_can_be_overruled():
    border = composed.UNMEASURED.composed
    assert composed.takes_composed(border, None) and not composed.takes_composed(border - 1, None)
    assert not composed.takes_composed(border, "a reason")
    with composed.use_path("composed"):
        assert composed.takes_composed(1, None) and not composed.takes_composed(1, "a reason")
    with composed.use_path("fused"):
        assert not composed.takes_composed(border, None)
    with pytest.raises(ValueError, match="'other'; expected one of auto"), composed.use_path("other"):
        pass


@pytest.mark.parametrize(
    ("size", "length", "rationales", "expected"),
    [
        (128, 255, 1, None),
        (128, 256, 1, "flash"),
        (128, 2047, 1, "flash"),
        (128, 2048, 1, "cudnn"),
        (128, 512, 2, None),
        (128, 1024, 2, "cudnn"),
        (64, 255, 2, None),
        (64, 256, 1, "flash"),
        (64, 256, 2, "flash"),
        (64, 1024, 2, "cudnn"),
        (64, 4096, 1, "flash"),
        (96, 2047, 1, None),  # not measured
        (96, 2048, 1, "flash"),
    ],
)
def test_what_was_measured_decides(monkeypatch, size, length, rationales, expected):
    """The path of a call on an H200, and torch's kernel in it; elsewhere the guess."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    columns = length * rationales
    shapes = [(1, 4, 3, columns, size), *[(1, 2, length, size)] * 2, *[(1, 2, 3, columns, size)] * 2]
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        ranges = [torch.empty(1, columns, dtype=torch.int32, device="cuda") for _ in range(2)]
        call = ThoughtAttention(*tensors, *ranges, None, 1.0, 0, 0.0)
        taken = composed.takes_composed(length, None, composed.borders(call))
        assert taken == (expected is not None)
        if expected is not None:
            assert stock.kernel_for(call.q, composed._preferred(call)) == expected
        with stock.use_stock("flash"):
            assert stock.kernel_for(call.q, "cudnn") == "flash"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert composed.borders(call) == composed.UNMEASURED


@pytest.mark.parametrize(
    ("rule", "padding", "expected"),
    [("all", None, True), ("all", "right", True), ("all", "left", False), ("stride:2", None, False)],
)
def test_a_model_promises_what_is_true(monkeypatch, rule, padding, expected):
    """Every call of a training step that says every_position has such columns."""
    said = []

    def watch(*tensors, every_position=False, **options):
        start, stop = tensors[5:7]
        if tensors[0].shape[2] > 1:  # the packed pass
            said.append(every_position)
        if every_position:
            length, columns = tensors[1].shape[2], stop.shape[1]
            wanted = torch.arange(columns, dtype=torch.int32) // (columns // length) + 1
            seen = start < stop  # columns of padding see nothing and nothing reads them
            assert seen.any() and (start[seen] == 0).all()
            assert torch.equal(stop[seen], wanted.expand_as(stop)[seen])
        return thought_attention(*tensors, every_position=every_position, **options)

    monkeypatch.setattr(attention, "thought_attention", watch)
    model = QuietStarForCausalLM.from_base(
        tiny_decoder("llama", num_hidden_layers=1),
        start_token_id=94,
        end_token_id=95,
        thought_length=2,
        talk_length=2,
        num_rationales=2,
        think_at=rule,
        self_check=False,  # it makes a packed pass of its own
    ).train()
    ids = torch.randint(0, 90, (2, 7))
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[0, slice(0, 2) if padding == "left" else slice(5, 7)] = 0
    model(ids, attention_mask=mask, labels=ids)
    assert said == [expected]
    model(
        ids,
        labels=ids,
        thought_ids=torch.zeros(2, 1, 3, 2).long(),
        anchors=torch.tensor([[2, 1, 6]] * 2),
    )
    assert said == [expected, False]


# ---- on a GPU alone


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", stock.KERNELS)
@pytest.mark.parametrize(
    "shape", [(2, 32, 8, 15, 15, 256, 1, 128), (1, 8, 8, 15, 15, 1000, 2, 64)], ids=str
)
def test_agrees_with_the_fused_kernel(shape, kernel):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensors, start, stop, _ = every_position(*shape, torch.bfloat16, "cuda")
    found = []
    for impl in ("composed", "fused"):
        with stock.use_stock(kernel):
            out, lse = thought_attention(
                *tensors, start, stop, every_position=True, return_lse=True, impl=impl
            )
            found.append([lse, out, *torch.autograd.grad(out.square().sum(), tensors)])
    for a, b in zip(*found, strict=True):
        error = float((a - b).float().abs().max() / b.float().abs().max())
        assert error < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", stock.KERNELS)
def test_in_a_cuda_graph(kernel):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shape = (1, 4, 2, 5, 5, 64, 2, 64)
    tensors, start, stop, _ = every_position(*shape, torch.bfloat16, "cuda")
    dout = torch.randn_like(tensors[0])

    def run():
        with stock.use_stock(kernel):
            out = thought_attention(*tensors, start, stop, every_position=True, impl="composed")
            return [out, *torch.autograd.grad(out, tensors, dout)]

    graph, found = captured(run)
    with torch.no_grad():
        for t in (*tensors, dout):
            t.normal_()
    graph.replay()
    for i, (a, b) in enumerate(zip(found, run(), strict=True)):
        # The stock kernel adds up dq in any order; what is left is the same.
        tolerance = 2e-2 if i == 1 else 0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

"""thought_attention's kernel beyond its blocks (16 keys a panel, 64 a block, 120 rows a tile)."""

from __future__ import annotations

import pytest
import torch
from attention_cases import gradients, make, random_shape, sizes_alone
from poison import poisoned_memory

from quietstar_ext.native import native
from quietstar_ext.thought_attention import thought_attention


@pytest.fixture
def poison():
    with poisoned_memory():
        yield


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
            atol=1e-5 * max(1, float(size)),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("number", range(25))
def test_random_shapes_and_options(simd, poison, number):
    sizes, lengths = (1, 4, 16, 24, 32, 64, 80), (0, 1, 40, 64, 150)
    shape = random_shape((0, 1, 2, 5, 15, 17, 70), sizes, lengths, (1, 2, 7, 33))
    tensors, start, stop, options = make(*shape, dtype=torch.float32)
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


@pytest.mark.parametrize("window", [1, 16, 17, 70, 149, 150])
@pytest.mark.parametrize("queries", [1, 20, 150])
def test_windows_in_long_columns(simd, poison, queries, window):
    options = {"sinks": True, "sliding_window": window}
    tensors, start, stop, options = make(1, 2, 1, queries, 150, 3, 20, 8, options, dtype=torch.float32)
    assert_near_the_truth(tensors, start, stop, options)


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


def test_workspace_holds_no_scores():
    sizes = (1, 8, 2, 15, 15, 512, 512, 64)  # B Hq Hkv Sq Sk M N D
    scores = 8 * 15 * 512 * 512 * 4
    call = sizes_alone(torch.float32, sizes, threads=2)
    assert native().thought_attention_workspace(call, False) < scores / 50
    assert native().thought_attention_workspace(call, True) < scores / 5

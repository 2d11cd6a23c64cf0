"""mixing_head against the concatenated MLP written with nn.functional.linear."""

from __future__ import annotations

import contextlib

import pytest
import torch
from mixing_head_cases import NAMES, concatenated, gradients, make, make_clear_of_zero, on

from quietstar_ext.mixing_head import mixing_head

ACTIVATIONS = ["identity", "sigmoid"]
RESULTS = ["mixed", "w", *NAMES]

#             P  rows  d  base_index
SHAPES = {
    "row for row": (9, 9, 8, False),
    "rows share bases": (5, 23, 16, True),
    "some bases unused": (40, 7, 12, True),
    "odd width": (4, 33, 19, True),
    "one element": (1, 1, 1, True),
    "one row": (3, 1, 16, True),
    "one base": (1, 11, 32, True),
    "many rows": (100, 301, 33, True),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_concatenation(place, shape, activation):
    tensors, index = on(place.device, make_clear_of_zero(*shape, dtype=place.dtype))
    mixed, w = mixing_head(*tensors, activation, base_index=index, impl=place.impl)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = concatenated(exact, activation, index)
    assert mixed.shape == tensors[1].shape
    assert w.shape == (shape[1], 1)
    got, want = gradients([mixed, w], tensors), gradients(wanted, exact)
    for name, a, b in zip(RESULTS, [mixed, w, *got], [*wanted, *want], strict=True):
        # Sums over rows cancel: what rounding leaves is measured by the tensor's largest entry.
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1)
        assert error < place.tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_last_layer(place, dtype):
    """As initialised: w = 0, the mixture is the base to the last bit, and w3 still learns."""
    tensors, index = on(place.device, make(5, 23, 16, True, dtype=dtype))
    tensors[6] = torch.zeros_like(tensors[6]).requires_grad_()
    mixed, w = mixing_head(*tensors, base_index=index, impl=place.impl)
    assert not w.any()
    assert torch.equal(mixed, tensors[0][index])
    grads = dict(zip(NAMES, gradients([mixed, w], tensors), strict=True))
    assert grads["w3"].any()
    assert not any(grads[name].any() for name in ["w1", "b1", "w2", "b2", "thought"])


def test_base_rows_gather_their_gradient(place):
    """A base row's gradient is the sum over the thought rows that use it, and 0 if none does."""
    tensors, _ = on(place.device, make(4, 6, 8, True, dtype=place.dtype))
    index = torch.tensor([2, 0, 2, 2, 0, 1], device=place.device)
    base = tensors[0]
    mixed, w = mixing_head(*tensors, base_index=index, impl=place.impl)
    (grad,) = gradients([mixed, w], [base])
    copies = base.detach()[index].requires_grad_()
    mixed, w = mixing_head(copies, *tensors[1:], impl=place.impl)
    (of_copies,) = gradients([mixed, w], [copies])
    wanted = torch.stack([of_copies[index == p].sum(0) for p in range(4)])
    torch.testing.assert_close(grad, wanted, **place.close)
    assert not grad[3].any()


def test_positions_without_rows(place):
    tensors, _ = on(place.device, make(3, 2, 8, False, dtype=place.dtype))
    index = torch.zeros(2, dtype=torch.int64, device=place.device)
    mixed, w = mixing_head(*tensors, base_index=index, impl=place.impl)
    assert mixed.shape == (2, 8) and w.shape == (2, 1)
    assert not gradients([mixed, w], tensors)[0][1:].any()


@pytest.mark.parametrize("spoilt", range(2), ids=NAMES[:2])
def test_nan_stays_in_its_rows(place, spoilt):
    tensors, index = on(place.device, make(6, 30, 16, True, dtype=torch.bfloat16))
    with torch.no_grad():
        tensors[spoilt][2, 5] = torch.nan
    mixed, w = mixing_head(*tensors, base_index=index, impl=place.impl)
    hit = index == 2 if spoilt == 0 else torch.arange(30, device=index.device) == 2
    assert w[hit].isnan().all()
    assert mixed[hit].isnan().all()
    assert mixed[~hit].isfinite().all()
    assert w[~hit].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors, index = make(3, 5, 4, True)

    def call(*inputs):
        return mixing_head(*inputs, activation, base_index=index, impl="reference")

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_instruction_set(simd, shape, dtype):
    clear = make_clear_of_zero if dtype == torch.float32 else make
    tensors, index = clear(*shape, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    got = mixing_head(*tensors, "sigmoid", base_index=index, impl="fused")
    wanted = mixing_head(*exact, "sigmoid", base_index=index, impl="reference")
    if dtype == torch.float32:
        got_all = [*got, *gradients(got, tensors)]
        for a, b in zip(got_all, [*wanted, *gradients(wanted, exact)], strict=True):
            assert (a.double() - b).abs().max() <= 5e-5 * b.abs().max().clamp(min=1)
    else:
        for a, b in zip(got, wanted, strict=True):
            # What is blended is of size 1 and may cancel.
            size = max(float(b.norm()), b.numel() ** 0.5)
            assert (a - b).norm() <= 8 * torch.finfo(dtype).eps * size
        assert all(grad.isfinite().all() for grad in gradients(got, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(threads, dtype):
    """The kernels, that is: the products around them are the framework's, and kept on one thread."""
    tensors, index = make(70, 3000, 48, True, dtype=dtype)
    results = []
    for count in (1, 2, 5):
        with threads_of_kernel(count):
            outputs = mixing_head(*tensors, base_index=index, impl="fused")
            results.append([*outputs, *gradients(outputs, tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@contextlib.contextmanager
def threads_of_kernel(count):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: count)
        yield

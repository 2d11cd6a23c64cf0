"""mixing_head against the concatenated MLP written with nn.functional.linear."""

from __future__ import annotations

import contextlib

import pytest
import torch
from mixing_head_cases import NAMES, concatenated, gradients, make, make_clear_of_zero

from quietstar_ext.mixing_head import mixing_head

# The kernel's inputs are fp32, the reference's fp64.
IMPLS = ["reference", "fused"]
DTYPE = {"reference": torch.float64, "fused": torch.float32}
TOLERANCE = {"reference": 1e-12, "fused": 2e-5}
ACTIVATIONS = ["identity", "sigmoid"]

#             P  rows  d  base_index
SHAPES = {
    "row for row": (9, 9, 8, False),
    "rows share bases": (5, 23, 16, True),
    "some bases unused": (40, 7, 12, True),
    "odd width": (4, 33, 19, True),
    "one element": (1, 1, 1, True),
    "many rows": (100, 301, 33, True),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_concatenation(impl, shape, activation):
    tensors, index = make_clear_of_zero(*shape, dtype=DTYPE[impl])
    mixed, w = mixing_head(*tensors, activation, base_index=index, impl=impl)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = concatenated(exact, activation, index)
    assert mixed.shape == tensors[1].shape
    assert w.shape == (shape[1], 1)
    got, want = gradients([mixed, w], tensors), gradients(wanted, exact)
    names = ["mixed", "w", *NAMES]
    for name, a, b in zip(names, [mixed, w, *got], [*wanted, *want], strict=True):
        # Sums over rows cancel: what rounding leaves is measured by the tensor's largest entry.
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1)
        assert error < TOLERANCE[impl], f"{name}: {error:.1e}"


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_last_layer(impl):
    """As initialised: w = 0, the mixture is the base to the last bit, and w3 still learns."""
    tensors, index = make(5, 23, 16, True, dtype=DTYPE[impl])
    tensors[6] = torch.zeros_like(tensors[6]).requires_grad_()
    mixed, w = mixing_head(*tensors, base_index=index, impl=impl)
    assert not w.any()
    assert torch.equal(mixed, tensors[0][index])
    grads = dict(zip(NAMES, gradients([mixed, w], tensors), strict=True))
    assert grads["w3"].any()
    assert not any(grads[name].any() for name in ["w1", "b1", "w2", "b2", "thought"])


@pytest.mark.parametrize("impl", IMPLS)
def test_base_rows_gather_their_gradient(impl):
    """A base row's gradient is the sum over the thought rows that use it, and 0 if none does."""
    tensors, _ = make(4, 6, 8, True, dtype=DTYPE[impl])
    index = torch.tensor([2, 0, 2, 2, 0, 1])
    base = tensors[0]
    mixed, w = mixing_head(*tensors, base_index=index, impl=impl)
    (grad,) = gradients([mixed, w], [base])
    copies = base.detach()[index].requires_grad_()
    mixed, w = mixing_head(copies, *tensors[1:], impl=impl)
    (of_copies,) = gradients([mixed, w], [copies])
    wanted = torch.stack([of_copies[index == p].sum(0) for p in range(4)])
    torch.testing.assert_close(grad, wanted, rtol=TOLERANCE[impl], atol=TOLERANCE[impl])
    assert not grad[3].any()


@pytest.mark.parametrize(("positions", "rows"), [(0, 0), (3, 0)])
@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl, positions, rows):
    tensors, _ = make(positions, rows, 8, False, dtype=DTYPE[impl])
    index = torch.empty(0, dtype=torch.int64)
    mixed, w = mixing_head(*tensors, base_index=index, impl=impl)
    assert mixed.shape == (0, 8)
    assert w.shape == (0, 1)
    assert not any(grad.any() for grad in gradients([mixed, w], tensors))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    tensors, index = make(6, 9, 8, True, dtype=DTYPE[impl])
    plain = [t.detach() for t in tensors]
    strided = [torch.stack([t, t * torch.nan], -1)[..., 0] for t in plain]
    strided[2] = plain[2].T.contiguous().T
    torch.testing.assert_close(
        mixing_head(*strided, base_index=index, impl=impl),
        mixing_head(*plain, base_index=index, impl=impl),
        rtol=TOLERANCE[impl],
        atol=TOLERANCE[impl],
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors, index = make(3, 5, 4, True)

    def call(*inputs):
        return mixing_head(*inputs, activation, base_index=index, impl="reference")

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_error_budget(impl, dtype):
    """Our error against the fp64 truth is within that of the same MLP in this dtype.

    Large biases keep the arguments of relu away from 0, where the last bit of a sum, in whatever order
    it is taken, switches a whole term of the gradient on or off.
    """
    names = ["mixed", "w", *NAMES]
    errors, budgets, sizes = (dict.fromkeys(names, 0.0) for _ in range(3))

    def all_of(outputs, inputs):
        return [*outputs, *gradients(outputs, inputs)]

    for _ in range(10):  # single draws differ: where theirs cancel, ours need not
        tensors, index = make(30, 90, 64, True, dtype=dtype)
        with torch.no_grad():
            tensors[4].div_(8)
            for bias in (tensors[3], tensors[5]):
                bias.copy_(6 * torch.randn(64).sign())
        exact = [t.detach().double().requires_grad_() for t in tensors]
        truth = all_of(concatenated(exact, "identity", index), exact)
        ours = all_of(mixing_head(*tensors, base_index=index, impl=impl), tensors)
        theirs = all_of(concatenated(tensors, "identity", index), tensors)
        assert all(o.dtype == dtype for o in ours)
        for name, t, a, b in zip(names, truth, ours, theirs, strict=True):
            errors[name] += float((a - t).detach().norm())
            budgets[name] += float((b - t).detach().norm())
            sizes[name] += float(t.detach().norm())
    # In fp32 both are sums in some order, so neither is the better one.
    unit = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for name in names:
        assert errors[name] <= budgets[name] + unit * sizes[name], name


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    tensors, index = make(5, 7, 8, True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, w = mixing_head(*tensors, base_index=index, impl=impl)
    assert mixed.dtype == w.dtype == torch.bfloat16
    wanted = mixing_head(*(t.bfloat16() for t in tensors), base_index=index, impl=impl)
    assert torch.equal(mixed, wanted[0])
    assert all(grad.dtype == torch.float32 for grad in gradients([mixed, w], tensors))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph(impl, activation):
    torch.compiler.reset()
    tensors, index = make(5, 23, 16, True, dtype=DTYPE[impl])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*inputs):
        return mixing_head(*inputs, activation, base_index=index, impl=impl)

    got = compiled(*tensors)
    wanted = mixing_head(*tensors, activation, base_index=index, impl=impl)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradients(got, tensors), gradients(wanted, tensors))


def test_asking_for_a_kernel_that_is_not_there():
    tensors, index = make(2, 2, 4, True)
    with pytest.raises(RuntimeError, match="mixing_head: impl='fused' cannot.*not float64"):
        mixing_head(*tensors, base_index=index, impl="fused")


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t[0], r"base has shape \[4\]; expected \[P, d\]"),
        (0, lambda t: t.int(), "base has dtype int32"),
        (1, lambda t: t[:, 1:], r"thought has shape \[5, 3\]; expected \[rows, 4\]"),
        (1, lambda t: t.float(), "thought has dtype float32; expected float64"),
        (2, lambda t: t[:, 1:], r"w1 has shape \[4, 7\]; expected \[4, 8\]"),
        (3, lambda t: t[1:], "b1 has shape"),
        (4, lambda t: t[1:], "w2 has shape"),
        (5, lambda t: t[:, None], "b2 has shape"),
        (6, lambda t: t[0], r"w3 has shape \[4\]; expected \[1, 4\]"),
        (6, lambda t: t.to("meta"), "w3 is on meta; expected cpu"),
    ],
)
def test_tensor_errors(place, change, message):
    tensors, index = make(3, 5, 4, True)
    tensors[place] = change(tensors[place])
    with pytest.raises(ValueError, match=message):
        mixing_head(*tensors, base_index=index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation is 'relu'; expected one of identity, sigmoid"),
        ({"base_index": None}, "base has 3 rows and thought 5"),
        ({"base_index": torch.zeros(4).long()}, r"base_index has shape \[4\]; expected \[5\]"),
        ({"base_index": torch.zeros(5).int()}, "base_index has dtype int32; expected int64"),
        ({"base_index": torch.full((5,), 3)}, "base_index contains 3; expected values from 0 to 2"),
        ({"base_index": torch.full((5,), -1)}, "base_index contains -1"),
        ({"impl": "best"}, "impl is 'best'"),
    ],
)
def test_option_errors(options, message):
    tensors, index = make(3, 5, 4, True)
    with pytest.raises(ValueError, match=message):
        mixing_head(*tensors, **{"base_index": index, **options})


def test_no_tensor():
    tensors, index = make(3, 5, 4, True)
    with pytest.raises(TypeError, match=r"b1 is a NoneType; expected a torch\.Tensor"):
        mixing_head(*tensors[:3], None, *tensors[4:], base_index=index)


# ---- the kernel


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


def test_poisoned_memory(monkeypatch):
    """Whatever the outputs' memory holds, nothing of it is read."""
    tensors, index = make(9, 33, 19, True, dtype=torch.float32)
    clean = mixing_head(*tensors, base_index=index, impl="fused")
    wanted = [*clean, *gradients(clean, tensors)]
    for name in ("empty", "empty_like"):
        make_it = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=make_it, **k: f(*a, **k).fill_(torch.nan))
    poisoned = mixing_head(*tensors, base_index=index, impl="fused")
    got = [*poisoned, *gradients(poisoned, tensors)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("sigmoid", [False, True])
def test_opcheck(sigmoid):
    tensors, index = make(5, 9, 8, True, dtype=torch.float32)
    tensors = [t.detach() for t in tensors]
    for each in (index, None):
        base = tensors[0] if each is not None else torch.randn(9, 8)
        forward = torch.ops.quietstar.mixing_head_forward
        torch.library.opcheck(forward, (base, *tensors[1:], each, sigmoid))
        mixed, w, *kept = forward(base, *tensors[1:], each, sigmoid)
        grads = torch.randn_like(mixed), torch.randn_like(w)
        for wanted in ([True] * 7, [False, True] * 3 + [False]):
            torch.library.opcheck(
                torch.ops.quietstar.mixing_head_backward,
                (base, *tensors[1:], each, sigmoid, *kept, *grads, wanted),
            )


@pytest.mark.parametrize("place", range(7), ids=NAMES)
def test_one_gradient_alone(place):
    tensors, index = make(5, 9, 8, True, dtype=torch.float32)
    (wanted,) = gradients(mixing_head(*tensors, base_index=index, impl="fused"), [tensors[place]])
    frozen = [t if i == place else t.detach() for i, t in enumerate(tensors)]
    (got,) = gradients(mixing_head(*frozen, base_index=index, impl="fused"), [frozen[place]])
    torch.testing.assert_close(got, wanted)

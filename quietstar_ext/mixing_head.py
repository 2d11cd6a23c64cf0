"""The mixing head: how much of a prediction comes from the thought."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quietstar_ext import checks, mixing_head_cuda
from quietstar_ext.derivatives import first_only, refuse_batched, why_not_differentiable
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.native import DTYPE_CODES, native, takes_cuda_path, why_not_native
from quietstar_ext.precision import autocast_inputs, without_autocast
from quietstar_ext.reference.mixing_head import mixing_head as _reference

ACTIVATIONS = ("identity", "sigmoid")

torch.library.define(
    "quietstar::mixing_head_forward",
    "(Tensor base, Tensor thought, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, "
    "Tensor? base_index, bool sigmoid) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "quietstar::mixing_head_backward",
    "(Tensor grad_mixed, Tensor grad_w, Tensor base, Tensor thought, Tensor w1, Tensor w2, Tensor w3, "
    "Tensor gate, Tensor h1, Tensor h2, Tensor? base_index, bool sigmoid, bool[] wanted) -> Tensor[]",
)


def mixing_head(
    base: torch.Tensor,
    thought: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    w3: torch.Tensor,
    activation: str = "identity",
    *,
    base_index: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend each thought row with the base row that it speaks for.

    With b = base[base_index[r]] and z = thought[r]::

        h1 = relu(w1 [b ; z] + b1)     h2 = relu(w2 h1 + b2)     w = act(w3 h2)
        mixed = (1 - w) b + w z

    ``[b ; z]`` is never built: w1 splits into a base half and a thought half, and the base half is
    applied once to each of the P base rows, however many thought rows refer to it.

    Args:
        base: [P, d] hidden states without a thought; float32, bfloat16, float16 or float64
            (reference only).
        thought: [rows, d] hidden states after a thought, dtype and device of base.
        w1, b1: [d, 2d] (columns of the base first) and [d].
        w2, b2: [d, d] and [d].
        w3: [1, d], no bias. All parameters have base's dtype and device.
        activation: ``"identity"`` (w is unbounded) or ``"sigmoid"``.
        base_index: [rows] int64 in 0 .. P-1, the base row of each thought row; None is row for row
            and needs P == rows. Checked on the CPU; out of range it is a device-side assertion on
            CUDA, as for PyTorch's own indexing.
        impl: ``"auto"``, ``"fused"`` or ``"reference"``.

    Returns:
        mixed [rows, d] and w [rows, 1], both in base's dtype and both with gradients for base,
        thought and the five parameters. The blend uses w before it is rounded to that dtype. Under
        autocast all seven tensors are cast first, as for a matrix product.

    Raises:
        TypeError: an argument that must be a tensor is none.
        ValueError: a shape, dtype, device, index or option does not fit; the message names the
            argument.
        RuntimeError: ``impl="fused"`` and there is no kernel for this call,
            or a second derivative is taken through a kernel (the reference has them).

    Source: Zelikman et al. 2024 (arXiv 2403.09629), section 4.3. Mixing hidden states is mixing
    logits as long as the vocabulary layer is linear.
    """
    base, thought, w1, b1, w2, b2, w3 = autocast_inputs(base, thought, w1, b1, w2, b2, w3)
    _check(base, thought, w1, b1, w2, b2, w3, activation, base_index)

    tensors = (base, thought, w1, b1, w2, b2, w3)
    reason = _why_not_fused(thought) or why_not_differentiable(*tensors)
    chosen = choose_impl("mixing_head", impl, reason)
    with without_autocast(thought):
        if chosen == "reference":
            return _reference(*tensors, activation, base_index=base_index)
        mixed, w = _MixingHead.apply(*tensors, base_index, activation == "sigmoid")
        return mixed, w


def _why_not_fused(thought: torch.Tensor) -> str | None:
    reason = why_not_native(thought)
    if reason is None and takes_cuda_path(thought):
        most = mixing_head_cuda.most_width(thought.device)
        if thought.shape[1] > most:
            return f"the CUDA kernel takes widths up to {most} on this device, not {thought.shape[1]}"
    return reason


def _check(
    base: torch.Tensor,
    thought: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    w3: torch.Tensor,
    activation: str,
    base_index: torch.Tensor | None,
) -> None:
    checks.check_tensor("base", base, ["P", "d"], checks.FLOAT_DTYPES)
    positions, size = base.shape
    same = ([base.dtype], base.device)
    checks.check_tensor("thought", thought, ["rows", size], *same)
    checks.check_tensor("w1", w1, [size, 2 * size], *same)
    checks.check_tensor("b1", b1, [size], *same)
    checks.check_tensor("w2", w2, [size, size], *same)
    checks.check_tensor("b2", b2, [size], *same)
    checks.check_tensor("w3", w3, [1, size], *same)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    rows = thought.shape[0]
    if base_index is not None:
        checks.check_tensor("base_index", base_index, [rows], [torch.int64], base.device)
        checks.check_index_range("base_index", base_index, positions)
    elif rows != positions:
        raise ValueError(
            f"base has {positions} rows and thought {rows}; expected as many, or a base_index"
        )


class _MixingHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        thought: torch.Tensor,
        w1: torch.Tensor,
        b1: torch.Tensor,
        w2: torch.Tensor,
        b2: torch.Tensor,
        w3: torch.Tensor,
        base_index: torch.Tensor | None,
        sigmoid: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mixed, w, gate, h1, h2 = torch.ops.quietstar.mixing_head_forward(
            base, thought, w1, b1, w2, b2, w3, base_index, sigmoid
        )
        ctx.save_for_backward(base, thought, w1, w2, w3, gate, h1, h2, base_index, b1, b2)
        ctx.sigmoid = sigmoid
        return mixed, w

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        refuse_batched("mixing_head", grads[0])
        wanted = ctx.needs_input_grad[:7]
        *kept, b1, b2 = ctx.saved_tensors
        with torch.no_grad():
            results = torch.ops.quietstar.mixing_head_backward(*grads, *kept, ctx.sigmoid, wanted)
        shown = [g if want else None for g, want in zip(results, wanted, strict=True)]
        return (*first_only("mixing_head", (*kept[:5], b1, b2), shown), None, None)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _forward(
    base: torch.Tensor,
    thought: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    w3: torch.Tensor,
    base_index: torch.Tensor | None,
    sigmoid: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """mixed [rows, d], w [rows, 1], and for the backward pass the gate [rows] in fp32, h1 and h2
    [rows, d]."""
    if takes_cuda_path(thought):
        return mixing_head_cuda.forward(base, thought, w1, b1, w2, b2, w3, base_index, sigmoid)
    rows, size = thought.shape
    index = None if base_index is None else base_index.contiguous()
    base, thought, b2, w3 = (t.contiguous() for t in (base, thought, b2, w3))
    narrow = base.dtype != torch.float32
    from_base, h1 = _first_products(base, thought, w1, b1, index)
    mixed = torch.empty_like(thought)
    gate = torch.full((rows,), 0.5 if sigmoid else 0.0, dtype=torch.float32)
    if rows == 0 or size == 0:
        return mixed, gate[:, None].to(mixed.dtype, copy=True), gate, h1, h1.clone()
    sizes = (DTYPE_CODES[base.dtype], rows, base.shape[0], size, sigmoid)
    first = [_address(t) for t in (index, base, thought, from_base, h1)]
    native().mixing_first(*sizes, first + [0] * 15, torch.get_num_threads())
    # A bias added after the product was rounded to 16 bits could end on relu's other side.
    h2 = torch.nn.functional.linear(h1, w2, b2) if narrow else h1 @ w2.T
    tail = [_address(t) for t in (h2, None if narrow else b2, w3, mixed, gate)]
    native().mixing_tail(*sizes, first + tail + [0] * 10, torch.get_num_threads())
    return mixed, gate[:, None].to(mixed.dtype, copy=True), gate, h1, h2


def _first_products(
    base: torch.Tensor,
    thought: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """from_base [P, d] and h1 [rows, d], of which the kernel makes relu(h1 + from_base[index]).

    In 16 bits, the halves must not be rounded before they cancel, or many a relu switches. So the base
    half is taken in fp32 and cut in two: the upper part goes into the product's own fp32 sum, and the
    kernel adds the rest, far smaller, to the rounded result.
    """
    size = thought.shape[1]
    w_base, w_thought = w1[:, :size], w1[:, size:]
    if base.dtype == torch.float32:
        return torch.addmm(b1, base, w_base.T), thought @ w_thought.T
    from_base = torch.addmm(b1.float(), base.float(), w_base.float().T)
    upper = from_base.to(base.dtype)
    rest = from_base.sub_(upper).to(base.dtype)
    h1 = upper if index is None else upper.index_select(0, index)
    return rest, h1.addmm_(thought, w_thought.T)


def _backward(
    grad_mixed: torch.Tensor,
    grad_w: torch.Tensor,
    base: torch.Tensor,
    thought: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    gate: torch.Tensor,
    h1: torch.Tensor,
    h2: torch.Tensor,
    base_index: torch.Tensor | None,
    sigmoid: bool,
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    """Gradients of base, thought, w1, b1, w2, b2 and w3; empty where not wanted."""
    (rows, size), dtype = thought.shape, thought.dtype
    if rows == 0 or size == 0:
        shapes = (base.shape, thought.shape, w1.shape, (size,), w2.shape, (size,), w3.shape)
        return [
            base.new_zeros(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
        ]
    if takes_cuda_path(thought):
        kept = (base, thought, w1, w2, w3, gate, h1, h2, base_index)
        results = mixing_head_cuda.backward(grad_mixed, grad_w, *kept, sigmoid, wanted)
        return _only(wanted, results, base)
    index = None if base_index is None else base_index.contiguous()
    base, thought, w3, grad_mixed = (t.contiguous() for t in (base, thought, w3, grad_mixed))
    grad_gate = grad_w.flatten().float().contiguous()
    grad_thought, grad_h2, grad_h1 = (torch.empty_like(thought) for _ in range(3))
    grad_base, grad_from_base = torch.empty_like(base), torch.empty_like(base)
    grad_b1, grad_b2, grad_w3 = (torch.empty(size, dtype=torch.float32) for _ in range(3))
    addresses = [
        _address(t)
        for t in (
            *(index, base, thought, None, h1, h2, None, w3, None, gate, grad_mixed, grad_gate),
            *(grad_thought, grad_base, grad_h1, grad_from_base, grad_h2),
            *(grad_b1, grad_b2, grad_w3),
        )
    ]
    sizes = (DTYPE_CODES[dtype], rows, base.shape[0], size, sigmoid)
    native().mixing_tail_backward(*sizes, addresses, torch.get_num_threads())
    torch.mm(grad_h2, w2, out=grad_h1)
    native().mixing_first_backward(*sizes, addresses, torch.get_num_threads())

    grad_w1 = w1.new_empty(w1.shape if wanted[2] else (0,))
    if wanted[0]:
        grad_base.addmm_(grad_from_base, w1[:, :size])
    if wanted[1]:
        grad_thought.addmm_(grad_h1, w1[:, size:])
    if wanted[2]:
        torch.mm(grad_from_base.T, base, out=grad_w1[:, :size])
        torch.mm(grad_h1.T, thought, out=grad_w1[:, size:])
    results = [
        grad_base,
        grad_thought,
        grad_w1,
        grad_b1.to(dtype),
        grad_h2.T @ h1 if wanted[4] else None,
        grad_b2.to(dtype),
        grad_w3.to(dtype)[None],
    ]
    return _only(wanted, results, base)


def _only(
    wanted: Sequence[bool], results: Sequence[torch.Tensor | None], like: torch.Tensor
) -> list[torch.Tensor]:
    """The results that are wanted, and empty tensors in place of the others."""
    return [
        result if want and result is not None else like.new_empty(0)
        for result, want in zip(results, wanted, strict=True)
    ]


torch.library.impl("quietstar::mixing_head_forward", ["cpu", "cuda"])(_forward)
torch.library.impl("quietstar::mixing_head_backward", ["cpu", "cuda"])(_backward)


@torch.library.register_fake("quietstar::mixing_head_forward")
def _(base, thought, *rest):  # type: ignore[no-untyped-def]
    rows = thought.shape[0]
    plain = [thought.new_empty(thought.shape) for _ in range(3)]
    return (
        plain[0],
        thought.new_empty(rows, 1),
        thought.new_empty(rows, dtype=torch.float32),
        *plain[1:],
    )


@torch.library.register_fake("quietstar::mixing_head_backward")
def _(grad_mixed, grad_w, base, thought, w1, w2, w3, *rest):  # type: ignore[no-untyped-def]
    size = thought.shape[1]
    shapes = (base.shape, thought.shape, w1.shape, (size,), w2.shape, (size,), w3.shape)
    return [base.new_empty(s if want else (0,)) for s, want in zip(shapes, rest[-1], strict=True)]
